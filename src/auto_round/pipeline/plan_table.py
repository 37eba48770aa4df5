"""The plan with true sizes: what the exporters will write, counted before any weight is read."""

from __future__ import annotations

import math

from auto_round.export.exporter import Exporter
from auto_round.export.manifest import Manifest, make_manifest
from auto_round.pipeline.job import Job
from auto_round.schemes.plan import Plan
from auto_round.schemes.size import PlanSize


def manifests(job: Job) -> dict[str, Manifest]:
    """What each output holds, by format name."""
    return {name: _manifest(job, exporter) for name, exporter in job.exporters.items()}


def plan_table(job: Job) -> str:
    """The plan for people, with the bytes of the first format; further formats get a line each."""
    first, *others = job.exporters.items()
    name, exporter = first
    weights, size = _outside_of_layers(job)
    table = job.plan.table(
        job.source.layers,
        other_weights=weights,
        other_bytes=size,
        stored_bytes=_manifest(job, exporter).layer_bytes(),
    )
    lines = [f"format {name}:", table] if others else [table]
    lines += [f"format {other}: {_manifest(job, e).nbytes / 1e6:.2f} MB" for other, e in others]
    return "\n".join(lines)


def plan_size(job: Job, exporter: Exporter) -> PlanSize:
    """Weights and bytes before and after, as this format stores them; headers of files not included."""
    weights, size = _outside_of_layers(job)
    stored = _manifest(job, exporter).layer_bytes()
    return job.plan.measure(job.source.layers, other_weights=weights, other_bytes=size, stored_bytes=stored)


def _manifest(job: Job, exporter: Exporter) -> Manifest:
    return make_manifest(exporter, job.plan, job.source.layers, job.source.tensors)


def _outside_of_layers(job: Job) -> tuple[int, int]:
    """Weights and bytes of tensors that are no layers: embeddings (a tied head's too), norms, biases."""
    plan: Plan = job.plan
    layers = {layer.tensor for layer in job.source.layers if layer.name != plan.tied_head}
    others = [spec for name, spec in job.source.tensors.items() if name not in layers]
    counts = [math.prod(spec.shape) for spec in others]
    return sum(counts), sum(n * spec.dtype.itemsize for n, spec in zip(counts, others, strict=True))
