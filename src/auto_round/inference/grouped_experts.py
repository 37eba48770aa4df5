"""Fused experts that stay packed: only those that some token chose are multiplied, each with its own kernel.

A module of fused experts says how it computes (`models.experts`), so its products are exchanged for those of
packed matrices and the rest stays Transformers' own: gates, activations, norms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import UnsupportedError
from auto_round.facts.inputs import WEIGHT
from auto_round.inference.experts import PackedExperts
from auto_round.inference.qlinear import QuantLinear, named
from auto_round.models.experts import ExpertParts, read_call, run_experts
from auto_round.models.fused import MatrixPlace
from auto_round.models.names import Recipe


class GroupedExperts(PackedExperts):
    """A module of fused experts whose matrices are quantized linear layers.

    They hang below it under the names that they have in the checkpoint, so they are loaded, moved, saved and
    given to kernels as all others are.
    """

    def __init__(
        self,
        fused: nn.Module,
        recipes: Mapping[str, Recipe],
        packed: Mapping[str, tuple[str, QuantLinear]],
        places: Mapping[str, Mapping[str, MatrixPlace]],
    ) -> None:
        """Take the place of `fused`, all of whose matrices are packed.

        Args:
            fused: the module of experts; `ExpertParts.of` knows it.
            recipes: parameter of it -> how tensors on disk become it.
            packed: tensor name on disk -> path below this module, and the layer.
            places: parameter -> tensor name on disk -> where it lies in the parameter.
        """
        super().__init__(fused, recipes, packed)
        for name, child in fused.named_children():
            self.add_module(name, child)
        parts = ExpertParts.of(fused)
        if parts is None:
            raise UnsupportedError(f"{type(fused).__name__} does not say how its experts compute")
        self._parts = parts
        # In a tuple, or the layers would be registered once more, under other names.
        self._rows = ({p: _in_order(packed, places[p], parts.count) for p in (parts.up, parts.down)},)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the fused module gives, `[tokens, width]`."""
        call = read_call(args, kwargs)
        if call is None:
            raise UnsupportedError("experts are called with hidden states, indices and weights of experts")
        parts = self._parts

        def up(expert: int, x: Tensor) -> Tensor:
            return self._product(parts.up, expert, x)

        def down(expert: int, x: Tensor) -> Tensor:
            return self._product(parts.down, expert, x)

        return run_experts(self.fused, call, parts.count, up, down)

    def _product(self, parameter: str, expert: int, x: Tensor) -> Tensor:
        layers = self._rows[0][parameter][expert]
        made: Tensor
        if len(layers) == 1:
            made = layers[0][1](x)
        elif all(len(rows) == 2 for rows, _ in layers):
            made = torch.cat([layer(x) for _, layer in layers], dim=-1)
        else:  # rows of several matrices in turn
            made = x.new_empty(*x.shape[:-1], max(rows[1] for rows, _ in layers))
            for rows, layer in layers:
                made[..., slice(*rows)] = layer(x)
        bias = self._parameters.get(f"{parameter}_bias")
        return made if bias is None else made.add(bias[expert])

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        layer = self._weights[name]
        try:
            return layer.dequantize(dtype) if isinstance(layer, QuantLinear) else super()._read(name, dtype)
        except UnsupportedError as error:
            raise named(name.removesuffix(WEIGHT), error) from error


def _in_order(
    packed: Mapping[str, tuple[str, QuantLinear]], places: Mapping[str, MatrixPlace], count: int
) -> list[list[tuple[tuple[int, ...], QuantLinear]]]:
    """Layers of each expert with their rows, in the order of these."""
    found: list[list[tuple[tuple[int, ...], QuantLinear]]] = [[] for _ in range(count)]
    for name, place in places.items():
        found[place.expert or 0].append((place.rows or (0, -1), packed[name][1]))
    return [sorted(each, key=lambda pair: pair[0]) for each in found]


def can_run(fused: nn.Module, packed: Collection[str]) -> bool:
    """Whether the experts of a module can be multiplied packed.

    Args:
        fused: the module.
        packed: its parameters all of whose matrices are packed, in places that are known.
    """
    parts = ExpertParts.of(fused)
    return parts is not None and parts.up in packed and parts.down in packed
