"""Where the tensors of a quantized folder end up in Transformers' model, for a conversion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from auto_round.errors import AutoRoundError
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.facts.layer import Layer
from auto_round.facts.loading import Loading
from auto_round.inference.disk_names import DiskNames
from auto_round.log import logger
from auto_round.models.fused import taken_whole
from auto_round.models.loading import loading_of, rebuilding_methods
from auto_round.models.names import Recipe, map_names
from auto_round.models.places import Locator
from auto_round.models.skeleton import build_skeleton, straighten
from auto_round.pipeline.converting.source import QuantizedFolder


def with_modules(stored: QuantizedFolder) -> tuple[QuantizedFolder, Loading | None]:
    """The same folder with the module of each layer, and how Transformers loads the model.

    Where no model can be built, as of a folder with code of its own, nothing is known and nothing changed.
    """
    try:
        model = build_skeleton(_config(stored), torch.float32)
        names = map_names(model, stored.tensors, straighten(model))
    except (AutoRoundError, ValueError, KeyError, OSError, TypeError) as error:
        logger.debug("%s: its modules are not known: %s", stored.folder, error)
        return stored, None
    locator = Locator(model, stored.tensors)
    recipes = {piece.name: recipe for recipe in names.recipes for piece in recipe.pieces}
    single = {p.name: recipe for recipe in DiskNames.of(model).split.values() for p in recipe.pieces}
    layers = tuple(
        _single(layer, single[layer.tensor], locator, model)
        if layer.tensor in single
        else _placed(layer, recipes.get(layer.tensor), locator)
        for layer in stored.layers
    )
    return replace(stored, layers=layers, parameters=names.parameters), loading_of(model, names)


def _config(stored: QuantizedFolder) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(stored.folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _placed(layer: Layer, recipe: Recipe | None, locator: Locator) -> Layer:
    places = "" if recipe is None else locator.locate(recipe)
    if recipe is None or isinstance(places, str):
        return layer
    place = places[layer.tensor]
    return replace(layer, parameter=recipe.targets[0], expert=place.expert, rows=place.rows)


def _single(layer: Layer, recipe: Recipe, locator: Locator, model: Any) -> Layer:
    """A matrix of experts that plain folders have in one tensor."""
    module = model.get_submodule(recipe.targets[0].rpartition(".")[0])
    rebuilt = COMPRESSED_TENSORS in rebuilding_methods(module)
    return replace(_placed(layer, recipe, locator), fused=True, whole=taken_whole(module), rebuilt=rebuilt)
