"""Bits in the files of an output, for targets that are sizes."""

from __future__ import annotations

from auto_round.autoscheme.candidates import Candidates
from auto_round.checkpoint.writer import lay_out
from auto_round.export.exporter import Exporter
from auto_round.export.gguf.container import ALIGNMENT
from auto_round.facts.layer import Layer
from auto_round.models.source import ModelSource
from auto_round.schemes.gguf_types import type_of_scheme
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme

HEADER_BYTES = 256
"""Room in headers of safetensors for a layer that has another number of tensors, or longer offsets, than in
the trial."""


def file_bits(exporter: Exporter, layer: Layer, scheme: QuantizationScheme | None) -> float:
    """Bits that a layer takes in the files of a format: also zero points that its readers want stored."""
    fmt = None if scheme is None else scheme.weight_format()
    if scheme is None or fmt is None:
        return 8 * layer.nbytes
    kind = type_of_scheme(scheme)
    if kind is not None:
        return kind.nbytes(layer.shape) * 8
    parts = exporter.spec(layer, fmt).values()
    return sum(part.nbytes for part in parts) * 8


def rest_bits(exporter: Exporter, plan: Plan, source: ModelSource, candidates: Candidates) -> float:
    """Bits of everything in the files but the layers whose scheme is chosen.

    Headers of safetensors name every tensor and where it begins, so they grow by some bytes with the plan; in
    GGUF files the padding behind a tensor may.

    Args:
        exporter: the format.
        plan: gives the layers schemes of the options in turn; it says nothing of the embedding.
        source: the model.
        candidates: what is chosen.
    """
    listed = exporter.manifest(plan, source.layers, source.kept)
    specs = {name: (spec.dtype, tuple(spec.shape)) for name, spec in listed.specs.items()}
    own_kind = exporter.shards(listed)
    shards, room = (lay_out(specs), HEADER_BYTES) if own_kind is None else (own_kind, ALIGNMENT)
    picked = zip(candidates.groups, candidates.in_turn, strict=True)
    schemes = {name: candidates.plans[pick].scheme_of(name) for names, pick in picked for name in names}
    schemes |= {name: plan.scheme_of(name) for name in schemes if name in plan.entries}
    own = sum(file_bits(exporter, candidates.layers[name], scheme) for name, scheme in schemes.items())
    return (sum(shard.size for shard in shards) + room * len(schemes)) * 8 - own
