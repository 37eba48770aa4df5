"""What a run over a pipeline says of itself: `report.json` and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.checkpoint.disk import atomic_write_bytes, atomic_write_json
from auto_round.checkpoint.journal import Journal
from auto_round.checkpoint.record import OURS
from auto_round.diffusion.prepare import PipelineJob
from auto_round.diffusion.rows import RecordedRows
from auto_round.diffusion.tune_component import Held
from auto_round.models.pipeline_folder import require_diffusers
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.plan_table import plan_size
from auto_round.pipeline.writing.cost import COST
from auto_round.pipeline.writing.planned import planned
from auto_round.report.record import REPORT
from auto_round.version import __version__


@dataclass(frozen=True, slots=True)
class Made:
    """What became of one component.

    Attributes:
        job: its run.
        journal: what each block came to.
        held: what held-out rows say; None without rows.
        nbytes: format -> bytes of its weight files.
        checked: what came of reading it back.
        rows: what it was tuned on; None without.
    """

    job: Job
    journal: Journal
    held: Held | None
    nbytes: Mapping[str, int]
    checked: Mapping[str, Any]
    rows: RecordedRows | None


def write_reports(
    job: PipelineJob,
    folders: Mapping[str, Path],
    made: Mapping[str, Made],
    shown: Mapping[str, Any] | None,
    root: Path,
) -> dict[str, Any]:
    """Write `report.json` and the model card into every folder, and the report above them; returns it."""
    first = job.first
    report: dict[str, Any] = {
        OURS: __version__,
        "versions": {"torch": torch.__version__, "diffusers": require_diffusers().__version__},
        "model": job.pipeline.folder.name,
        "pipeline": job.pipeline.class_name,
        "scheme": first.plan.scheme.label,
        "formats": list(first.exporters),
        "method": job.method.sentence,
        "seed": job.method.seed,
        "captions": {"tuned": job.tuned, "held_out": len(job.captions) - job.tuned},
        "drawing": {"steps": job.call.steps, "seed": job.call.seed, "arguments": dict(job.call.arguments)},
        "components": {name: _component(part) for name, part in made.items()},
    }
    if shown is not None:
        report["pictures"] = dict(shown)
    for folder in {*folders.values(), root}:
        atomic_write_json(folder / REPORT, report)
    for name, folder in folders.items():
        atomic_write_bytes(folder / "README.md", _card(job, name, report).encode())
    return report


def _component(made: Made) -> dict[str, Any]:
    job, first = made.job, next(iter(made.job.exporters.values()))
    size = plan_size(job, first)
    found: dict[str, Any] = {
        "layers": {"quantized": len(job.plan.quantized), "kept": len(job.plan.kept)},
        "bits_per_quantized_weight": round(size.bits_per_weight, 4),
        "bytes_before": sum(s.nbytes for s in job.source.tensors.values()),
        "bytes_after": dict(made.nbytes),
        "blocks": [{k: v for k, v in e.items() if k not in ("tensors", COST)} for e in made.journal.entries],
        "plan": planned(job, first),
        "verified": dict(made.checked),
    }
    if made.rows is not None:
        found["rows"] = {
            "tuned": job.tuned,
            "held_out": len(made.rows) - job.tuned,
            "fingerprint": made.rows.fingerprint,
        }
    if made.held is not None and made.held.rows:
        by_step = {str(step): error for step, error in made.held.by_step.items()}
        found["held_out"] = {"rows": made.held.rows, "relative_error": made.held.error, "by_step": by_step}
    return found


def _card(job: PipelineJob, name: str, report: Mapping[str, Any]) -> str:
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [auto-round]",
        "---",
        "",
        f"# {report['model']}, {report['scheme']}",
        "",
        f"{report['pipeline']} with rounded weights: {report['method']}.",
        "",
        "| component | bytes before | bytes after | error of predictions, held-out captions |",
        "|---|---|---|---|",
    ]
    for part, found in report["components"].items():
        held = found.get("held_out")
        error = "" if held is None else f"{held['relative_error']:.3g}"
        lines.append(f"| {part} | {found['bytes_before']} | {found['bytes_after'][name]} | {error} |")
    lines += [
        "",
        "```python",
        "import torch",
        f"from diffusers import {job.pipeline.class_name}",
        "",
        f'pipeline = {job.pipeline.class_name}.from_pretrained("<this folder>", dtype=torch.bfloat16)',
        "```",
        "",
    ]
    if name != "fake":
        lines[-1:] = ["", "Loading needs the package auto-round.", ""]
    return "\n".join(lines)
