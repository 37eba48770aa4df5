"""Asks Transformers what it does with a model's tensors while it loads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from auto_round.facts.inputs import WEIGHT
from auto_round.facts.loading import Loading
from auto_round.models.fused import of_transformers
from auto_round.models.names import NameMap

if TYPE_CHECKING:
    from torch import nn


_NUMBER = re.compile(r"\.\d+\.")
"""In the names of blocks."""


def loading_of(model: Any, names: NameMap) -> Loading:
    """Ask Transformers' conversions and its table of replaced modules.

    Args:
        model: the model, weights on any device.
        names: its tensors' recipes.
    """
    converted = tuple(
        tuple(piece.name for piece in recipe.pieces)
        for recipe in names.recipes
        if recipe.converter is not None and all(p.endswith(WEIGHT) for p in _patterns(recipe.converter))
    )
    return Loading(converted, _rebuilt(model, names), _weights_only(model, names))


def _patterns(converter: Any) -> list[str]:
    """Patterns of a converter's sources as Transformers' quantizers look at them.

    Source: `HfQuantizer.update_weight_conversions` of Transformers 5.24.
    """
    return list(getattr(converter, "_original_source_patterns", converter.source_patterns))


def rebuilding_methods(module: nn.Module) -> tuple[str, ...]:
    """Methods of quantization for which Transformers builds linear layers in place of a module of experts.

    Source: `HfQuantizer._convert_model_for_quantization` of Transformers 5.
    """
    from transformers.quantizers import base

    table: Mapping[str, Any] = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    entry = table.get(type(of_transformers(module)).__name__, {"quantization_methods": ()})
    return tuple(str(getattr(method, "value", method)) for method in entry["quantization_methods"])


def _weights_only(model: Any, names: NameMap) -> frozenset[str]:
    """See `Loading.weights_only`; only outside of blocks, whose names are changed as a whole."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    found = set()
    for disk, parameter in names.parameters.items():
        if disk == parameter or not disk.endswith(WEIGHT) or _NUMBER.search(disk):
            continue
        packed, wanted = (f"{name.removesuffix(WEIGHT)}.qweight" for name in (disk, parameter))
        key, _ = rename_source_key(packed, renamings, [], model.base_model_prefix, {wanted: None})
        if key != wanted:
            found.add(disk)
    return frozenset(found)


def _rebuilt(model: Any, names: NameMap) -> dict[str, tuple[str, ...]]:
    """See `Loading.rebuilt`."""
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        methods = rebuilding_methods(module)
        if not methods:
            continue
        inside = [
            piece.name
            for target, recipe in names.by_target.items()
            if target.startswith(f"{path}.")
            for piece in recipe.pieces
        ]
        for method in methods:
            found.setdefault(method, []).extend(inside or [path])
    return {method: tuple(tensors) for method, tensors in found.items()}
