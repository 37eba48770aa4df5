"""Tensors and layers as an output keeps them, where it keeps them in another dtype than the source's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from auto_round.facts.layer import Layer
from auto_round.facts.tensor import TensorSpec

_CAST = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of weights; those of packed numbers and of indices are never cast."""


def kept_tensors(tensors: Mapping[str, TensorSpec], wanted: torch.dtype | None) -> Mapping[str, TensorSpec]:
    """Every tensor of a source as an output keeps it.

    Those of another dtype than most weights stay: a model keeps them so on purpose (routers in float32).

    Args:
        tensors: what the source holds.
        wanted: the dtype that the user asked for; None for the model's own.
    """
    own = _most(tensors)
    if wanted is None or wanted is own:
        return tensors
    return {n: replace(s, dtype=wanted) if s.dtype is own else s for n, s in tensors.items()}


def kept_layers(
    layers: Sequence[Layer], tensors: Mapping[str, TensorSpec], wanted: torch.dtype | None
) -> tuple[Layer, ...]:
    """Layers in the dtype in which an output keeps them.

    Args:
        layers: as they lie on disk.
        tensors: what the source holds.
        wanted: as for `kept_tensors`.
    """
    own = _most(tensors)
    if wanted is None or wanted is own:
        return tuple(layers)
    return tuple(replace(layer, dtype=wanted) if layer.dtype is own else layer for layer in layers)


def _most(tensors: Mapping[str, TensorSpec]) -> torch.dtype | None:
    """Dtype of most weights; None where there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for spec in tensors.values():
        if spec.dtype in _CAST:
            sizes[spec.dtype] += spec.count
    return sizes.most_common(1)[0][0] if sizes else None
