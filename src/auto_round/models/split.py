"""Recipes for experts that a plain folder holds in one tensor, and a quantized one matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from auto_round.facts.inputs import WEIGHT
from auto_round.facts.tensor import STACK, TensorSpec
from auto_round.models.fused import FusedMatrix, Stacking, heights, lies_turned, split, stored_turned
from auto_round.models.names import DiskTensor, NameMap, Recipe
from auto_round.models.roles import fused_experts


def split_recipes(
    model: Any, names: NameMap, disk: Mapping[str, TensorSpec]
) -> dict[str, tuple[Recipe, dict[str, TensorSpec]]]:
    """Parameter of experts -> how it is made of single matrices, and what these would be as plain tensors.

    Args:
        model: as Transformers builds it, its weights on any device.
        names: its tensors' recipes.
        disk: dtype and shape of every tensor of a plain folder.
    """
    found: dict[str, tuple[Recipe, dict[str, TensorSpec]]] = {}
    for path, module in model.named_modules():
        for name in fused_experts(module):
            recipe = names.by_target.get(f"{path}.{name}")
            if recipe is None or len(recipe.pieces) != 1 or len(disk[recipe.pieces[0].name].shape) != STACK:
                continue
            pieces = split(module, name, recipe.pieces[0].name)
            if not isinstance(pieces, str) and lies_turned(recipe.converter, alike=True) is not None:
                spec = disk[recipe.pieces[0].name]
                found[f"{path}.{name}"] = _recipe(module, f"{path}.{name}", pieces, spec)
    return found


def _recipe(
    module: nn.Module, parameter: str, pieces: tuple[FusedMatrix, ...], spec: TensorSpec
) -> tuple[Recipe, dict[str, TensorSpec]]:
    shape, turned = tuple(module.get_parameter(parameter.rpartition(".")[2]).shape), stored_turned(module)
    straight = (shape[0], shape[2], shape[1]) if turned else shape
    specs = {
        piece.name + WEIGHT: TensorSpec(spec.dtype, (height, straight[2]))
        for piece, height in zip(pieces, heights(straight, pieces), strict=True)
    }
    places = {piece.name + WEIGHT: piece.place for piece in pieces}
    tensors = tuple(DiskTensor(name, name) for name in specs)
    return Recipe(parameter, (parameter,), tensors, Stacking(parameter, shape, turned, places)), specs
