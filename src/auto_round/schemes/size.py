"""Size: weights and bytes of a planned model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from auto_round.facts.layer import Layer
from auto_round.schemes.entry import PlanEntry


@dataclass(frozen=True, slots=True)
class PlanSize:
    """Weights and bytes, before and after.

    Attributes:
        quantized_layers: number of quantized layers.
        quantized_weights: weights in them.
        quantized_bytes: what their codes, steps and zero points take.
        kept_weights: weights of layers that are kept.
        kept_bytes: what these take.
        source_bytes: all of it before quantization.
        other_weights: weights outside of the plan (embeddings, norms, biases); 0 of the layers alone.
        other_bytes: what these take.
    """

    quantized_layers: int
    quantized_weights: int
    quantized_bytes: float
    kept_weights: int
    kept_bytes: int
    source_bytes: int
    other_weights: int = 0
    other_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight: codes, steps and zero points; 0 when nothing is quantized."""
        return self.quantized_bytes * 8 / self.quantized_weights if self.quantized_weights else 0.0

    @property
    def bits_per_weight_overall(self) -> float:
        """Stored bits per weight of the whole model."""
        weights = self.quantized_weights + self.kept_weights + self.other_weights
        return self.total_bytes * 8 / weights if weights else 0.0

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors after quantization."""
        return math.ceil(self.quantized_bytes) + self.kept_bytes + self.other_bytes


def measure(
    entries: Mapping[str, PlanEntry],
    layers: Iterable[Layer],
    *,
    stored_bytes: Mapping[str, int] | None = None,
    shared: frozenset[str] = frozenset(),
) -> PlanSize:
    """Size of a model's layers under a plan.

    Args:
        entries: layer name -> what becomes of it.
        layers: every layer.
        stored_bytes: layer name -> bytes on disk, where an exporter knows better than the format alone
            (padding, zero points of symmetric layouts).
        shared: layers whose tensor is counted elsewhere on disk (a tied head).
    """
    stored = stored_bytes or {}
    count = quantized_weights = kept_weights = kept_bytes = source_bytes = 0
    quantized_bytes = 0.0
    for layer in layers:
        scheme = entries[layer.name].scheme
        weights = layer.weights
        source = 0 if layer.name in shared else layer.nbytes
        source_bytes += source
        fmt = None if scheme is None else scheme.weight_format()
        if fmt is None:
            kept_weights += weights if source else 0
            kept_bytes += source
            continue
        count += 1
        quantized_weights += weights
        quantized_bytes += stored.get(layer.name, fmt.bits_per_weight(layer.shape) * weights / 8)
    return PlanSize(
        quantized_layers=count,
        quantized_weights=quantized_weights,
        quantized_bytes=quantized_bytes,
        kept_weights=kept_weights,
        kept_bytes=kept_bytes,
        source_bytes=source_bytes,
    )
