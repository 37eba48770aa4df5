"""Fused experts of Transformers 5: one packed matrix per expert and projection on disk, 16 bits in memory.

Transformers keeps the experts of a block in tensors `[n_experts, out, in]`, which no kernel of this version
multiplies packed. They are therefore dequantized once, at load: the file is small, the memory is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import Refusal, UnsupportedError
from auto_round.inference.disk_names import ConfigNames
from auto_round.inference.qlinear import PackedWeight, named
from auto_round.models.names import Recipe
from auto_round.models.roles import fused_experts
from auto_round.stored.formats import StoredFormats

WEIGHT = ".weight"


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
        self._weights = {name: weight for name, (_, weight) in packed.items()}
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


def expert_names(model: Any, names: ConfigNames) -> Iterator[tuple[str, ...]]:
    """All names of every matrix of fused experts."""
    for path, module in model.named_modules():
        for parameter in fused_experts(module):
            recipe = names.disk.recipe(f"{path}.{parameter}")
            for piece in () if recipe is None else recipe.pieces:
                yield _names_of(piece.name.removesuffix(WEIGHT), names)


def _names_of(layer: str, names: ConfigNames) -> tuple[str, ...]:
    return names.disk.inside(layer), *names.of_layer(layer)


def pack_experts(model: Any, stored: StoredFormats, names: ConfigNames) -> tuple[str, ...]:
    """Replace modules of fused experts by ones that can be filled from a checkpoint.

    Returns:
        Paths of the replaced modules.

    Raises:
        UnsupportedError: experts of which only some are quantized, or that are stored in an unusual way.
    """
    found = []
    for path, module in list(model.named_modules()):
        recipes: dict[str, Recipe] = {}
        packed: dict[str, tuple[str, PackedWeight]] = {}
        for parameter, transposed in fused_experts(module).items():
            recipe = names.disk.recipe(f"{path}.{parameter}")
            if recipe is None or transposed or len(recipe.targets) != 1:
                continue
            weights = _packed_weights(path, recipe, stored, names)
            if weights:
                recipes[parameter] = recipe
                packed.update(weights)
        if packed:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedExperts(module, recipes, packed))
            found.append(path)
    return tuple(found)


def _packed_weights(
    path: str, recipe: Recipe, stored: StoredFormats, names: ConfigNames
) -> dict[str, tuple[str, PackedWeight]]:
    """Tensor name on disk -> path below the experts' module, and holder; empty when nothing is quantized."""
    found: dict[str, tuple[str, PackedWeight]] = {}
    if any(len(names.disk.disk[piece.name].shape) != 2 for piece in recipe.pieces):
        return found  # experts fused on disk too are never packed
    for piece in recipe.pieces:
        layer = piece.name.removesuffix(WEIGHT)
        inside = names.disk.inside(layer)
        n_out, n_in = names.disk.disk[piece.name].shape
        how = stored.layer(_names_of(layer, names))
        if how is None or how.layout.accepts(how.format, (n_out, n_in)) is not None:
            continue
        if not inside.startswith(f"{path}."):
            raise _unusual(layer, f'it would be loaded as "{inside}", outside of "{path}"')
        packed = PackedWeight(how.tensors((n_out, n_in)))
        found[piece.name] = (inside.removeprefix(f"{path}."), packed)
    plain = [piece.name for piece in recipe.pieces if piece.name not in found]
    if found and plain:
        raise _unusual(plain[0].removesuffix(WEIGHT), "it is not quantized, but other experts beside it are")
    return found


def _unusual(layer: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f'experts of layer "{layer}" cannot be loaded',
        [Refusal("auto_round", reason, "quantize all experts of a block alike")],
    )


def _plant(root: nn.Module, path: str, module: nn.Module) -> None:
    """Hang a module below `root`, making the modules between."""
    *parents, child = path.split(".")
    for name in parents:
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(child, module)
