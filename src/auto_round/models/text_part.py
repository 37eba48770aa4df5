"""The tensors of a model's language model, under the names that they would have in a model of text alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.facts.layer import Role
from auto_round.facts.tensor import TensorSpec
from auto_round.models.anatomy import Anatomy
from auto_round.models.names import NameMap
from auto_round.models.roles import find_decoder, find_towers

_DECODER, _HEAD = "model.", "lm_head.weight"


def text_tensors(
    model: Any, anatomy: Anatomy, names: NameMap, disk: Mapping[str, TensorSpec]
) -> dict[str, str]:
    """Tensor on disk -> its name in a model of text alone; all, as they are, where there is no encoder.

    What lies in front of the blocks' numbers differs (`language_model.model.`, `model.language_model.`,
    `model.text_model.`); it becomes `model.`, and the head `lm_head.weight`. Names inside of blocks stay as
    on disk.

    Args:
        model: the skeleton.
        anatomy: its layers and blocks.
        names: its tensors' recipes.
        disk: dtype and shape of every tensor on disk.
    """
    if not find_towers(model):
        return {name: name for name in disk}
    first = anatomy.blocks[0]
    decoder = find_decoder(model, [block.module for block in anatomy.blocks]) + "."
    prefix = first.disk.removesuffix(first.module.removeprefix(decoder))
    found: dict[str, str] = {}
    for recipe in names.recipes:
        if all(target.startswith(decoder) for target in recipe.targets):
            for piece in recipe.pieces:
                inside = piece.name.removeprefix(prefix)
                found[piece.name] = piece.name if inside == piece.name else _DECODER + inside
    for layer in anatomy.layers:
        if layer.role is Role.HEAD and layer.tensor == f"{layer.name}.weight":
            found[layer.tensor] = _HEAD
    return found
