"""The plan in a report: layers of one kind with one scheme in one line, with the blocks in which they lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from auto_round.export.exporter import Exporter
from auto_round.facts.layer import Block, Layer
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.plan_table import manifest_of

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""Number of an expert in a layer's name."""


@dataclass(slots=True)
class _Sum:
    """Layers of one kind in one block that are stored alike."""

    layers: int = 0
    weights: int = 0
    nbytes: float = 0.0


@dataclass(slots=True)
class _Line:
    """A line of the report: the same sums in several blocks."""

    fields: dict[str, Any]
    blocks: list[int] = field(default_factory=list)


def planned(job: Job, exporter: Exporter) -> list[dict[str, Any]]:
    """What becomes of every layer, in few lines.

    Args:
        job: the run.
        exporter: format whose bytes are counted.

    Returns:
        For each kind of layer and scheme: `kind` (name inside the block, experts as `*`), `blocks` (first and
        last of each stretch of blocks; empty outside of blocks), `scheme`, `bits` of a code, `stored_bits`
        per weight with steps and zero points, `layers` and `weights` in each of these blocks, `reason`.
    """
    stored = manifest_of(job, exporter).layer_bytes()
    sums: dict[tuple[Any, ...], _Sum] = {}
    for layer in job.source.layers:
        entry = job.plan.entries[layer.name]
        bits = layer.dtype.itemsize * 8 if entry.scheme is None else entry.scheme.bits
        key = (kind_of(layer, job.source.blocks), entry.label, bits, entry.why(layer.name), layer.block)
        found = sums.setdefault(key, _Sum())
        found.layers += 1
        found.weights += layer.weights
        found.nbytes += stored.get(layer.name, _bytes(job, layer))
    lines: dict[tuple[Any, ...], _Line] = {}
    for (kind, scheme, bits, reason, block), found in sums.items():
        fields = {
            "kind": kind,
            "scheme": scheme,
            "bits": bits,
            "stored_bits": round(found.nbytes * 8 / found.weights, 4),
            "layers": found.layers,
            "weights": found.weights,
            "reason": reason,
        }
        line = lines.setdefault(tuple(fields.values()), _Line(fields))
        if block is not None:
            line.blocks.append(block)
    return [{**line.fields, "blocks": stretches(line.blocks)} for line in lines.values()]


def stretches(numbers: list[int]) -> list[list[int]]:
    """First and last of each unbroken stretch of ascending numbers."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def kind_of(layer: Layer, blocks: Sequence[Block]) -> str:
    """Name of a layer inside its block, with `*` for the number of an expert; its whole name outside."""
    name = layer.name
    if layer.block is not None:
        name = name.removeprefix(blocks[layer.block].disk + ".")
    return _NUMBER.sub("*", f".{name}")[1:]


def _bytes(job: Job, layer: Layer) -> float:
    """Bytes of a layer where the exporter does not say."""
    fmt = job.plan.format_of(layer.name)
    return layer.nbytes if fmt is None else fmt.bits_per_weight(layer.shape) * layer.weights / 8
