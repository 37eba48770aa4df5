"""Modules of fused experts found in a model and replaced by ones that a quantized checkpoint can fill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.inputs import WEIGHT
from auto_round.inference.disk_names import ConfigNames
from auto_round.inference.experts import PackedExperts
from auto_round.inference.grouped_experts import GroupedExperts, can_run
from auto_round.inference.qlinear import PackedWeight, QuantLinear
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import select_kernel
from auto_round.models.fused import MatrixPlace, Stacking
from auto_round.models.names import Recipe
from auto_round.models.places import Locator
from auto_round.models.roles import fused_experts
from auto_round.stored.formats import StoredFormats, StoredLayer


@dataclass(frozen=True, slots=True)
class Kernels:
    """How kernels of packed layers are chosen.

    Attributes:
        device: kind of device that runs them.
        backend: name by which they are chosen.
    """

    device: str
    backend: str

    def layer(self, how: StoredLayer, shape: tuple[int, int], dtype: torch.dtype) -> QuantLinear:
        """A packed layer without a bias.

        Args:
            how: how it is stored.
            shape: `(out, in)`.
            dtype: dtype in which it computes.
        """
        spec = LinearSpec(how.format, shape, dtype, self.device, how.inputs, how.held)
        return QuantLinear(spec, how.layout, select_kernel(spec, self.backend), None, self.backend)


class _Piece(NamedTuple):
    """One packed matrix of a fused parameter: where it hangs, how it is stored, `(out, in)`, its dtype."""

    path: str
    how: StoredLayer
    shape: tuple[int, int]
    dtype: torch.dtype


def expert_names(model: Any, names: ConfigNames) -> Iterator[tuple[str, ...]]:
    """All names of every matrix of fused experts."""
    for path, module in model.named_modules():
        for parameter in fused_experts(module):
            recipe = names.disk.recipe(f"{path}.{parameter}")
            for piece in () if recipe is None else recipe.pieces:
                yield _names_of(piece.name.removesuffix(WEIGHT), names)


def _names_of(layer: str, names: ConfigNames) -> tuple[str, ...]:
    return names.disk.inside(layer), *names.of_layer(layer)


def pack_experts(model: Any, stored: StoredFormats, names: ConfigNames, kernels: Kernels) -> tuple[str, ...]:
    """Replace modules of fused experts by ones that can be filled from a checkpoint.

    Returns:
        Paths of the replaced modules.

    Raises:
        UnsupportedError: experts of which only some are quantized, or that are stored in an unusual way.
    """
    found = []
    locator = Locator(model, names.disk.disk)
    for path, module in list(model.named_modules()):
        recipes: dict[str, Recipe] = {}
        pieces: dict[str, _Piece] = {}
        for parameter, transposed in fused_experts(module).items():
            recipe = names.disk.recipe(f"{path}.{parameter}")
            if recipe is None or len(recipe.targets) != 1:
                continue
            if transposed and not isinstance(recipe.converter, Stacking):
                continue
            dtype = module.get_parameter(parameter).dtype
            if own := _pieces(path, recipe, stored, names, dtype):
                recipes[parameter] = recipe
                pieces |= own
        if pieces:
            parent, _, child = path.rpartition(".")
            places = {parameter: locator.locate(recipe) for parameter, recipe in recipes.items()}
            stand_in = _stand_in(module, recipes, pieces, places, kernels)
            setattr(model.get_submodule(parent), child, stand_in)
            found.append(path)
    return tuple(found)


def _stand_in(
    module: nn.Module,
    recipes: Mapping[str, Recipe],
    pieces: Mapping[str, _Piece],
    places: Mapping[str, Mapping[str, MatrixPlace] | str],
    kernels: Kernels,
) -> PackedExperts:
    """Packed experts that run, where the module says how; else ones that are dequantized once loaded."""
    known = {parameter: found for parameter, found in places.items() if not isinstance(found, str)}
    if can_run(module, known):
        layers = {n: (p.path, kernels.layer(p.how, p.shape, p.dtype)) for n, p in pieces.items()}
        return GroupedExperts(module, recipes, layers, known)
    weights = {n: (p.path, PackedWeight(p.how.tensors(p.shape))) for n, p in pieces.items()}
    return PackedExperts(module, recipes, weights)


def _pieces(
    path: str, recipe: Recipe, stored: StoredFormats, names: ConfigNames, dtype: torch.dtype
) -> dict[str, _Piece]:
    """Tensor name on disk -> what will hold it; empty when nothing is quantized."""
    found: dict[str, _Piece] = {}
    if any(len(names.disk.disk[piece.name].shape) != 2 for piece in recipe.pieces):
        return found  # a fused tensor is never packed
    for piece in recipe.pieces:
        layer = piece.name.removesuffix(WEIGHT)
        inside = names.disk.inside(layer)
        n_out, n_in = names.disk.disk[piece.name].shape
        how = stored.layer(_names_of(layer, names))
        if how is None or how.layout.accepts(how.format, (n_out, n_in)) is not None:
            continue
        if not inside.startswith(f"{path}."):
            raise _unusual(layer, f'it would be loaded as "{inside}", outside of "{path}"')
        found[piece.name] = _Piece(inside.removeprefix(f"{path}."), how, (n_out, n_in), dtype)
    plain = [piece.name for piece in recipe.pieces if piece.name not in found]
    if found and plain:
        raise _unusual(plain[0].removesuffix(WEIGHT), "it is not quantized, but other experts beside it are")
    return found


def _unusual(layer: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f'experts of layer "{layer}" cannot be loaded',
        [Refusal("auto_round", reason, "quantize all experts of a block alike")],
    )
