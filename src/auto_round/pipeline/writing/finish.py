"""The files beside the weights: configurations, tokenizer, report and model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from auto_round.calibration.rows import CalibrationRows
from auto_round.checkpoint.disk import atomic_write_json
from auto_round.checkpoint.journal import Journal
from auto_round.checkpoint.record import OURS
from auto_round.consumers.lines import loading
from auto_round.export.exporter import Exporter
from auto_round.export.hf_config import copy_side_files, read_config, write_configs
from auto_round.export.model_card import CardFacts, Figure, write_model_card
from auto_round.export.unplanned import with_unplanned
from auto_round.facts.tensor import dtype_name
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.plan_table import plan_size
from auto_round.pipeline.running.coverage import coverage
from auto_round.pipeline.running.hard_cases import hard_cases
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.pipeline.running.input_squares import load_inputs
from auto_round.pipeline.running.measure import Measured
from auto_round.pipeline.writing.cost import COST
from auto_round.pipeline.writing.planned import planned
from auto_round.report.record import CHOSEN_PLAN, DISTILLED, REPORT, SENSITIVITY
from auto_round.version import __version__


def write_configs_and_tokenizer(job: Job, folders: Mapping[str, Path]) -> None:
    """Everything that a loader needs beside the weights."""
    source, blocks = job.source, job.source.blocks
    plan, layers = with_unplanned(job.plan, source.layers, blocks, source.kept, source.parameters)
    for name, exporter in job.exporters.items():
        if exporter.file is not None:
            exporter.write_beside(folders[name], source.read_tensor)
            continue  # the file holds all of it
        folder = folders[name]
        quantization = exporter.config(plan, layers, blocks, job.method.facts)
        if source.folder is not None:
            config = read_config(source.folder)
            copy_side_files(source.folder, folder)
        else:
            config = {
                **source.config.to_diff_dict(),
                "dtype": dtype_name(source.dtype),
            }
            for part in (job.tokenizer, job.processor):
                if part is not None:
                    part.save_pretrained(folder)
        own = None if quantization is None else exporter.float_dtype
        dtype = job.kept_dtype if own is None else own
        write_configs(folder, config, quantization, untied=job.plan.untie_head, dtype=dtype)


def build_report(
    job: Job, journal: Journal, measured: Measured | None, nbytes: Mapping[str, int]
) -> dict[str, Any]:
    """What `report.json` says; no times and no dates, so that equal runs give equal files."""
    first = next(iter(job.exporters.values()))
    size = plan_size(job, first)
    before = sum(s.nbytes for s in job.source.tensors.values())
    report: dict[str, Any] = {
        OURS: __version__,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": _model_name(job),
        "scheme": _scheme(job),
        "formats": list(job.exporters),
        "method": job.method.sentence,
        "seed": job.method.seed,
        "layers": {"quantized": len(job.plan.quantized), "kept": len(job.plan.kept)},
        "bits_per_quantized_weight": round(size.bits_per_weight, 4),
        "bytes_before": before,
        "bytes_after": dict(nbytes),
        "blocks": [
            {k: v for k, v in e.items() if k not in ("tensors", COST)}
            for e in journal.entries
            if DISTILLED not in e
        ],
        "plan": planned(job, first),
    }
    if job.rows is not None:
        report["calibration"] = _calibration(job, job.rows)
    if job.smoothing is not None:
        report["smoothing"] = asdict(job.smoothing)
    if measured is not None:
        report["held_out"] = _held_out(job, measured)
    for entry in journal.entries:
        if DISTILLED in entry:
            report[DISTILLED] = entry[DISTILLED]
    if job.options.chosen is not None:
        apart = ("use", "layer_config", SENSITIVITY)
        report["auto_scheme"] = {k: v for k, v in job.options.chosen.items() if k not in apart}
        report[SENSITIVITY] = job.options.chosen[SENSITIVITY]
    if borrowed := InputRanges.from_entries(journal.entries).borrowed:
        report["inputs_ranged_by_peers"] = len(borrowed)
    if experts := coverage(journal.entries, job.options.calibration.expert_rows):
        report["experts"] = experts
    hard = hard_cases(journal.entries, None if measured is None else measured.comparison.kl)
    if hard:
        report["hard_cases"] = hard
    return report


def _calibration(job: Job, data: CalibrationRows) -> dict[str, Any]:
    """What the run was tuned and judged on."""
    return {
        "dataset": job.method.dataset,
        "summary": data.summary,
        "fingerprint": data.fingerprint,
        "sources": [asdict(source) for source in data.sources],
        "letters": dict(data.letters),
        "rows_tuned": job.tuned,
        "rows_held_out": len(data.rows) - job.tuned if job.judged_apart else 0,
        "tokens_per_row": len(data.rows[0]),
        "tokens_tuned": sum(row.positions for row in data.rows[: job.tuned]),
    }


def _held_out(job: Job, measured: Measured) -> dict[str, Any]:
    """How the quantized model compares with the original on rows that were not tuned on."""
    found = measured.comparison
    return {
        "positions": found.positions,
        "tuned_on_too": not job.judged_apart,
        "perplexity_before": found.perplexity_reference,
        "perplexity_after": found.perplexity,
        "kl": found.kl,
        "same_top_token": found.agreement,
        "kl_histogram": measured.spread.to_json(),
    }


def write_report(job: Job, folders: Mapping[str, Path], report: Mapping[str, Any], root: Path) -> None:
    """Write `report.json` into every folder, and above them when there are several; and the model cards."""
    for name, exporter in job.exporters.items():
        atomic_write_json(folders[name] / REPORT, dict(report))
        if job.options.chosen is not None:
            plan = {k: v for k, v in job.options.chosen.items() if k != SENSITIVITY}
            atomic_write_json(folders[name] / CHOSEN_PLAN, plan)
        write_model_card(folders[name], _card(job, exporter, report, name))
    if root not in folders.values():
        atomic_write_json(root / REPORT, dict(report))


def hand_over_inputs(job: Job, scratch: Path, folder: Path) -> None:
    """Give what flowed into the layers to the formats, where it is to be written to a file.

    Args:
        job: the run.
        scratch: where the run kept what it saw.
        folder: folder that will become the output.
    """
    if not job.saves_imatrix:
        return
    inputs = load_inputs(scratch)
    for exporter in job.exporters.values():
        exporter.save_inputs(job.options, inputs, job.output, folder)


def _card(job: Job, exporter: Exporter, report: Mapping[str, Any], name: str) -> CardFacts:
    kept: dict[str, int] = {}
    for layer in job.plan.kept:
        reason = job.plan.entries[layer].why(layer)
        kept[reason] = kept.get(reason, 0) + 1
    held = report.get("held_out")
    figures = []
    if held is not None:
        rows = f"{held['positions']} {'tuned' if held['tuned_on_too'] else 'held-out'} tokens"
        figures = [
            Figure(f"perplexity, {rows}", held["perplexity_after"], held["perplexity_before"]),
            Figure(f"KL from the original, nats per token, {rows}", held["kl"]),
        ]
    config = exporter.config(job.plan, job.source.layers, job.source.blocks)
    return CardFacts(
        name=report["model"],
        scheme=_scheme(job),
        exporter=exporter.name,
        quant_method=None if config is None else config["quant_method"],
        method=job.method.sentence,
        bits_per_weight=report["bits_per_quantized_weight"],
        bytes_before=report["bytes_before"],
        bytes_after=report["bytes_after"][name],
        quantized=len(job.plan.quantized),
        kept=[f"{count} matrices: {reason}" for reason, count in sorted(kept.items())],
        data="" if job.rows is None else job.rows.summary,
        measured=figures,
        hub_id=_hub_id(job),
        options=job.method.facts,
        engines=loading(report.get("engines", {}).get(name, {})),
        auto_class=job.source.facts.auto_class,
        library=exporter.library,
        command=exporter.command,
    )


def _scheme(job: Job) -> str:
    """The scheme of the run, or those that AutoScheme chose among."""
    if job.options.chosen is None:
        return job.plan.scheme.label
    labels = dict.fromkeys(job.plan.entries[name].label for name in job.plan.quantized)
    return f"AutoScheme: {', '.join(sorted(labels))}"


def _hub_id(job: Job) -> str | None:
    """`owner/name` of the original on the hub; None for a folder and for a model in memory."""
    model = job.method.model
    return model if model and not Path(model).exists() and model.count("/") == 1 else None


def _model_name(job: Job) -> str:
    """Name of the original, for people."""
    folder = job.source.folder
    return _hub_id(job) or (folder.name if folder is not None else type(job.source.config).__name__)
