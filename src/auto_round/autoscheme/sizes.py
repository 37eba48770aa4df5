"""Bits in the files of an output, for targets that are sizes."""

from __future__ import annotations

import math
from collections.abc import Collection

from auto_round.checkpoint.writer import lay_out
from auto_round.export.exporter import Exporter
from auto_round.facts.layer import Layer
from auto_round.models.source import ModelSource
from auto_round.schemes.gguf_types import type_of_scheme
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme

HEADER_BYTES = 256
"""Room in headers for a layer that has another number of tensors, or longer offsets, than in the trial."""


def file_bits(exporter: Exporter, layer: Layer, scheme: QuantizationScheme | None) -> float:
    """Bits that a layer takes in the files of a format: also zero points that its readers want stored."""
    fmt = None if scheme is None else scheme.weight_format()
    if scheme is None or fmt is None:
        return math.prod(layer.shape) * layer.dtype.itemsize * 8
    kind = type_of_scheme(scheme)
    if kind is not None:
        return kind.nbytes(layer.shape) * 8
    parts = exporter.spec(layer, fmt).values()
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts) * 8


def rest_bits(exporter: Exporter, plan: Plan, source: ModelSource, chosen: Collection[str]) -> float:
    """Bits of everything in the files but the layers whose scheme is chosen.

    Headers name every tensor and where it begins, so they grow by some bytes with the plan.

    Args:
        exporter: the format.
        plan: any plan that gives the chosen layers schemes of the options.
        source: the model.
        chosen: layers whose scheme is chosen.
    """
    listed = exporter.manifest(plan, source.layers, source.tensors)
    specs = {name: (spec.dtype, tuple(spec.shape)) for name, spec in listed.specs.items()}
    shards = exporter.shards(listed) or lay_out(specs)
    names = set(chosen)
    own = sum(file_bits(exporter, x, plan.scheme_of(x.name)) for x in source.layers if x.name in names)
    return (sum(shard.size for shard in shards) + HEADER_BYTES * len(names)) * 8 - own
