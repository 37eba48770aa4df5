"""The plan with true sizes: what the exporters will write, counted before any weight is read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from auto_round.export.exporter import Exporter
from auto_round.export.manifest import Manifest
from auto_round.pipeline.deciding.job import Job
from auto_round.schemes.plan import Plan
from auto_round.schemes.plan_text import CODES, render_plan
from auto_round.schemes.size import PlanSize

ROUNDED: Final = "rounded weights in the source's dtype"
"""What the bits of a quantized weight hold where nothing is packed."""


def manifests(job: Job) -> dict[str, Manifest]:
    """What each output holds, by format name."""
    return {name: manifest_of(job, exporter) for name, exporter in job.exporters.items()}


def plan_table(job: Job, *, warned: bool = False) -> str:
    """The plan for people, with the bytes of the first format; further formats get a line each.

    Args:
        job: what was decided.
        warned: its warnings have been logged, so the table leaves them out.
    """
    first, *others = job.exporters.items()
    name, exporter = first
    size = plan_size(job, exporter)
    packs = not exporter.any_plan  # else weights are as wide as before, whatever their schemes
    table = render_plan(
        job.plan.entries,
        job.source.layers,
        size,
        () if warned else job.plan.warnings,
        manifest_of(job, exporter).layer_bytes() if packs else None,
        CODES if packs else ROUNDED,
    )
    lines = [f"format {name}:", table] if others else [table]
    if exporter.histogram():
        lines += [types_of(exporter)]
    lines += [f"format {other}: {manifest_of(job, e).nbytes / 1e6:.2f} MB" for other, e in others]
    return "\n".join(lines)


def plan_size(job: Job, exporter: Exporter) -> PlanSize:
    """Weights and bytes before and after, as this format stores them; headers of files not included."""
    listed = manifest_of(job, exporter)
    size = job.plan.measure(job.source.layers, stored_bytes=listed.layer_bytes())
    size = replace(
        size,
        other_weights=_outside_of_layers(job),
        other_bytes=listed.nbytes - math.ceil(size.quantized_bytes) - size.kept_bytes,
        source_bytes=sum(spec.nbytes for spec in job.source.tensors.values()),
    )
    types = exporter.histogram()
    if not types:
        return size
    # Tensors that are no layers get types too, and a tied head is the embedding.
    total = sum(count for _, count, _ in types.values())
    return replace(size, other_weights=total - size.quantized_weights - size.kept_weights)


def types_of(exporter: Exporter) -> str:
    """Types in a file in one line: tensors and share of the weights of each, bits per weight."""
    found = exporter.histogram()
    weights = sum(count for _, count, _ in found.values())
    nbytes = sum(size for _, _, size in found.values())
    shares = (f"{name.upper()} {n} ({count / weights:.1%})" for name, (n, count, _) in found.items())
    return f"{exporter.file}: {', '.join(shares)}; {nbytes * 8 / weights:.3f} bits per weight"


def manifest_of(job: Job, exporter: Exporter) -> Manifest:
    """What one output holds."""
    return exporter.manifest(job.plan, job.source.layers, job.source.kept)


def _outside_of_layers(job: Job) -> int:
    """Weights of tensors that are no layers: embeddings (a tied head's too), norms, biases."""
    plan: Plan = job.plan
    layers = {layer.tensor for layer in job.source.layers if layer.name != plan.tied_head}
    return sum(spec.count for name, spec in job.source.tensors.items() if name not in layers)
