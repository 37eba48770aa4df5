"""Fused experts of Transformers 5: packed matrices on disk, one tensor for each projection in the module.

A module that says how it computes stays packed (`grouped_experts`). Others, and those of which only one
projection is quantized, are dequantized once, at load: the file is small, the memory is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import UnsupportedError
from auto_round.facts.inputs import WEIGHT
from auto_round.inference.qlinear import PackedWeight, named
from auto_round.models.names import Recipe


class PackedExperts(nn.Module):
    """Stands in for a module of fused experts while a checkpoint is read.

    Its submodules are the packed matrices under the names that they have in the checkpoint.

    Attributes:
        layers: names on disk of the packed matrices, without `.weight`.
    """

    def __init__(
        self, fused: nn.Module, recipes: Mapping[str, Recipe], packed: Mapping[str, tuple[str, PackedWeight]]
    ) -> None:
        """Take the place of `fused`.

        Args:
            fused: the module of experts.
            recipes: parameter of it -> how tensors on disk become it, for those that are packed.
            packed: tensor name on disk -> path below this module, and what will hold the packed matrix.
        """
        super().__init__()
        self._fused = (fused,)  # in a tuple, or its parameters would be expected in the checkpoint
        self._recipes = recipes
        self._weights: Mapping[str, PackedWeight] = {n: weight for n, (_, weight) in packed.items()}
        self.layers = tuple(name.removesuffix(WEIGHT) for name in packed)
        for path, weight in packed.values():
            _plant(self, path, weight)
        for name, parameter in fused.named_parameters(recurse=False):
            if name not in recipes:
                self.register_parameter(name, parameter)

    def __getattr__(self, name: str) -> Any:
        """Parameters of the module that this one stands for: code that initializes weights asks for them."""
        if name in self.__dict__.get("_recipes", {}):
            return self._fused[0].get_parameter(name)
        return super().__getattr__(name)

    @property
    def fused(self) -> nn.Module:
        """The module that this one stands for; its own matrices have no numbers."""
        return self._fused[0]

    def on_disk(self) -> dict[str, PackedWeight]:
        """Name on disk, without `.weight` -> packed matrix."""
        return {name.removesuffix(WEIGHT): weight for name, weight in self._weights.items()}

    def dequantize(self, model: Any) -> nn.Module:
        """The module that this one stands for, with its weights.

        Args:
            model: the model that holds it.

        Raises:
            CheckpointError: stored tensors that contradict the configuration.
        """
        (fused,) = self._fused
        for name, parameter in list(fused.named_parameters(recurse=False)):
            if name in self._recipes:
                recipe = self._recipes[name]
                made = recipe.make(partial(self._read, dtype=parameter.dtype), model)[recipe.targets[0]]
                parameter = nn.Parameter(made, requires_grad=False)
            else:
                parameter = self.get_parameter(name)
            fused.register_parameter(name, parameter)
        return fused

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        try:
            q = self._weights[name].unpack().weight
        except UnsupportedError as error:
            raise named(name.removesuffix(WEIGHT), error) from error
        return q.format.dequantize(q, dtype)


def _plant(root: nn.Module, path: str, module: nn.Module) -> None:
    """Hang a module below `root`, making the modules between."""
    *parents, child = path.split(".")
    for name in parents:
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(child, module)
