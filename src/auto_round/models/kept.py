"""Tensors and layers as an output keeps them, where it keeps them in another dtype than the source's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch

from auto_round.facts.layer import Layer
from auto_round.facts.tensor import TensorSpec

_CAST = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of weights; those of packed numbers and of indices are never cast."""


def main_dtype(tensors: Mapping[str, TensorSpec]) -> torch.dtype | None:
    """The dtype of most weights; None without any.

    Args:
        tensors: what a source holds.
    """
    sizes: Counter[torch.dtype] = Counter()
    for spec in tensors.values():
        if spec.dtype in _CAST:
            sizes[spec.dtype] += spec.count
    return sizes.most_common(1)[0][0] if sizes else None


@dataclass(frozen=True, slots=True)
class Casts:
    """What becomes of the dtypes of a source in an output.

    Attributes:
        source: the dtype that is replaced: that of most weights. Tensors of another one keep it, for a model
            has them so on purpose (routers in float32).
        output: the one in its place.
        wide: tensors with which the model computes in float32, whatever it is loaded in: they stay.
    """

    source: torch.dtype
    output: torch.dtype
    wide: Set[str]

    def of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which an output keeps a tensor.

        Args:
            name: on disk.
            dtype: in the source.
        """
        return self.output if dtype == self.source and name not in self.wide else dtype


def kept_tensors(tensors: Mapping[str, TensorSpec], casts: Casts | None) -> Mapping[str, TensorSpec]:
    """Every tensor of a source as an output keeps it; `casts` is None where all stay as they are."""
    if casts is None:
        return tensors
    return {name: replace(spec, dtype=casts.of(name, spec.dtype)) for name, spec in tensors.items()}


def kept_layers(layers: Sequence[Layer], casts: Casts | None) -> tuple[Layer, ...]:
    """Layers in the dtype in which an output keeps them; `casts` is None where all stay as they are."""
    if casts is None:
        return tuple(layers)
    return tuple(replace(layer, dtype=casts.of(layer.tensor, layer.dtype)) for layer in layers)
