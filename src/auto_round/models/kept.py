"""Tensors and layers as an output keeps them, where it keeps them in another dtype than the source's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import torch

from auto_round.facts.layer import Layer
from auto_round.facts.tensor import TensorSpec

_CAST = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of weights; those of packed numbers and of indices are never cast."""

Casts = Mapping[torch.dtype, torch.dtype]
"""Dtype in the source -> the one in its place; without those that stay."""


def casts_of(tensors: Mapping[str, TensorSpec], wanted: torch.dtype | None) -> Casts:
    """What is cast: the dtype of most weights.

    Tensors of another one keep it: a model has them so on purpose (routers in float32).

    Args:
        tensors: what the source holds.
        wanted: the dtype that the user asked for; None for the model's own.
    """
    sizes: Counter[torch.dtype] = Counter()
    for spec in tensors.values():
        if spec.dtype in _CAST:
            sizes[spec.dtype] += spec.count
    own = sizes.most_common(1)[0][0] if sizes else None
    return {} if own is None or wanted is None or wanted is own else {own: wanted}


def kept_tensors(tensors: Mapping[str, TensorSpec], casts: Casts, wide: Set[str]) -> Mapping[str, TensorSpec]:
    """Every tensor of a source as an output keeps it.

    Args:
        tensors: what the source holds.
        casts: dtypes that change.
        wide: tensors with which the model computes in float32, whatever it is loaded in: they stay.
    """
    if not casts:
        return tensors
    return {
        name: spec if name in wide else replace(spec, dtype=casts.get(spec.dtype, spec.dtype))
        for name, spec in tensors.items()
    }


def kept_layers(layers: Sequence[Layer], casts: Casts, wide: Set[str]) -> tuple[Layer, ...]:
    """Layers in the dtype in which an output keeps them; the arguments are those of `kept_tensors`."""
    if not casts:
        return tuple(layers)
    return tuple(
        layer if layer.tensor in wide else replace(layer, dtype=casts.get(layer.dtype, layer.dtype))
        for layer in layers
    )
