"""From the tensors of a checkpoint to those of a GGUF file, by the name map of the `gguf` package."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.errors import CheckpointError, Refusal, UnsupportedError
from auto_round.export.gguf.families import Family
from auto_round.export.gguf.hyperparameters import constants, kv_heads
from auto_round.export.gguf.library import gguf
from auto_round.export.gguf.tensors import Change, GgufTensor, GroupsApart, RotaryPairs, RowOrder, TensorRows
from auto_round.facts.tensor import TensorSpec

_NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.masked_bias")
"""Buffers that old checkpoints hold and that no loader needs."""

SUFFIXES = (".weight", ".bias")
"""Endings of tensors that the tables of the `gguf` package leave out."""
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor of the checkpoint with its name in the file."""

    source: str
    name: str
    number: int | None


def name_tensors(
    family: Family,
    config: Any,
    stored: Mapping[str, TensorSpec],
    skipped: Collection[str] = (),
    called: Mapping[str, str] | None = None,
) -> tuple[GgufTensor, ...]:
    """Every tensor of the file, in the order of the checkpoint.

    Args:
        family: row of the table.
        config: the text model's configuration.
        stored: dtype and shape of every tensor in the checkpoint.
        skipped: tensors to leave out (a head that is the embedding).
        called: tensor in the checkpoint -> its name in a model of text alone, for those that belong to the
            file; None for all, under their own names.

    Raises:
        UnsupportedError: a tensor without a name in the file.
        CheckpointError: numbered tensors that are not complete.
    """
    inside = {n: n for n in stored} if called is None else called
    found, nameless = _names(family, config, {n: text for n, text in inside.items() if n not in skipped})
    if nameless:
        shown = ", ".join(nameless[:_SHOWN]) + (", ..." if len(nameless) > _SHOWN else "")
        raise UnsupportedError(
            f"{len(nameless)} tensors have no name in a GGUF file of architecture {family.arch}: {shown}",
            [Refusal("gguf", "llama.cpp would not read them", "pass a converter's file as --gguf_template")],
        )
    groups: dict[str, list[_Found]] = {}
    for each in found:
        groups.setdefault(each.name, []).append(each)
    tensors = [_tensor(family, config, name, members, stored) for name, members in groups.items()]
    return (*constants(config), *tensors)


def _names(family: Family, config: Any, sources: Mapping[str, str]) -> tuple[list[_Found], list[str]]:
    """Tensors with their names in the file, and those that have none."""
    module = gguf()
    arch = next(key for key, text in module.MODEL_ARCH_NAMES.items() if text == family.arch)
    names = module.get_tensor_name_map(arch, int(config.num_hidden_layers))
    found, nameless = [], []
    for source, called in sources.items():
        if called.endswith(_NOT_WEIGHTS):
            continue
        text, number = _stacked(family, called)
        for pattern, replacement in family.renamed:
            text = re.sub(pattern, replacement, text)
        name = names.get_name(text, try_suffixes=SUFFIXES)
        if name is None:
            nameless.append(source)
        else:
            found.append(_Found(source, name, number))
    return found, nameless


def _stacked(family: Family, source: str) -> tuple[str, int | None]:
    """Name without its number, and the number, for tensors that are put on top of each other."""
    for pattern, replacement in family.stacked:
        match = re.search(pattern, source)
        if match is not None:
            return source[: match.start()] + replacement + source[match.end() :], int(match["i"])
    return source, None


def _tensor(
    family: Family, config: Any, name: str, members: list[_Found], stored: Mapping[str, TensorSpec]
) -> GgufTensor:
    """The tensor that some tensors of the checkpoint make up together."""
    if members[0].number is None:
        if len(members) > 1:
            raise CheckpointError(
                f'"{members[0].source}" and "{members[1].source}" are both {name} in a GGUF file'
            )
        shape = tuple(stored[members[0].source].shape)
        module = members[0].source.rpartition(".")[0].rpartition(".")[2]
        change = Change.NONE
        if module in family.transposed and len(shape) == 2:
            change, shape = Change.TRANSPOSED, (shape[1], shape[0])
        elif family.plus_one and name.endswith("_norm.weight"):
            change = Change.PLUS_ONE
        rows = shape[0] if len(shape) == 1 else math.prod(shape[:-1])
        order = _order(family, config, module)
        return GgufTensor(name, shape, (TensorRows(members[0].source, 0, rows, order),), change)
    ordered = sorted(members, key=lambda each: each.number or 0)
    missing = sorted(set(range(len(ordered))) - {each.number for each in ordered})
    if missing:
        raise CheckpointError(f"{name}: number {missing[0]} of {len(ordered)} tensors is missing")
    shape = tuple(stored[ordered[0].source].shape)
    rows = math.prod(shape[:-1])
    pieces = tuple(TensorRows(each.source, i * rows, rows) for i, each in enumerate(ordered))
    return GgufTensor(name, (len(ordered), *shape), pieces)


def _order(family: Family, config: Any, module: str) -> RowOrder | None:
    kind = dict(family.rotated).get(module)
    heads = int(config.num_attention_heads)
    if kind == "groups":
        return GroupsApart(heads, kv_heads(config))
    if kind is None:
        return None
    return RotaryPairs(heads if kind == "q" else kv_heads(config))
