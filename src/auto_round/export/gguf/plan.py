"""The plan of a GGUF file: the mixture's types for its tensors, and what they mean for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from auto_round.errors import ConfigError
from auto_round.export.gguf.model import GgufModel
from auto_round.export.gguf.nvfp4 import KIND, refuse_unmultiplied, type_with_number
from auto_round.export.gguf.tensors import GgufTensor, TensorRows
from auto_round.facts.layer import Layer, Role
from auto_round.models.source import ModelSource
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.gguf_mixture import Shape, choose_types, fitting, is_quantizable
from auto_round.schemes.gguf_types import (
    EMBEDDING,
    FILE_TYPES,
    SCHEME_PREFIX,
    TYPES,
    FileType,
    GgufType,
    type_of_scheme,
)
from auto_round.schemes.make import make_plan
from auto_round.schemes.plan import Plan, PlanRequest
from auto_round.schemes.rules import Match, match_rule
from auto_round.schemes.scheme import PRESET_SCHEMES

_Places = Mapping[str, tuple[tuple[GgufTensor, TensorRows], ...]]
"""Tensor of the source -> the tensors and pieces that it becomes. Made once, there may be 20,000."""


@dataclass(frozen=True, slots=True)
class Types:
    """Types of the tensors of a file, and what it is called by them.

    Attributes:
        of: tensor -> type.
        kind: file type for the metadata.
        word: for the file's name.
    """

    of: dict[str, str]
    kind: FileType
    word: str


_KEPT_AS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""Dtype in the source -> type of tensors that the user wants kept."""


def plan_gguf(
    source: ModelSource, model: GgufModel, wanted: FileType, asked: PlanRequest, *, imatrix: bool
) -> tuple[Plan, Types]:
    """Types of all tensors, and the plan of all layers.

    The mixture decides where the user does not. Some of its rules count tensors ("the first eighth"); the
    user's tensors are counted too, so that a rule for one layer changes no other.

    Args:
        source: the model.
        model: its tensors in the file.
        wanted: the file type.
        asked: the user's rules.
        imatrix: importances steer the rounding.

    Returns:
        The plan, and the types.

    Raises:
        ConfigError: a rule that cannot hold in a GGUF file.
        UnsupportedError: llama.cpp does not multiply by what NVFP4 needs.
    """
    places = model.places()
    outside, inside = _split_rules(asked.layer_config, source, places)
    base = make_plan(
        source.layers,
        replace(asked, layer_config=inside, quant_lm_head=False),
        blocks=source.blocks,
        tied_head=source.tied_head,
        other_names=sorted({name.rpartition(".")[0] for name in source.tensors}),
    )
    usual = {**choose_types(replace(model.facts, imatrix=imatrix), wanted, model.shapes), **model.kept}
    fixed = _fixed(base, source, places) | outside
    wished = {t.name: fitting(fixed[t.name], t.shape[-1]) for t in model.tensors if t.name in fixed}
    wished = {**usual, **wished}
    if KIND in wished.values():
        refuse_unmultiplied(model.arch)
    types = _types(model, wished, places)
    entries = {}
    for layer in source.layers:
        if layer.tensor not in source.text_tensors:
            entries[layer.name] = PlanEntry(None, "not in the file: it holds the language model", fixed=True)
            continue
        kinds = [types[tensor.name] for tensor, _ in places.get(layer.alone, ())]
        kind = TYPES[kinds[0] if kinds else types[EMBEDDING]]  # a head may be stored as the embedding
        apart = layer.alone in model.apart
        entries[layer.name] = _entry(base.entries[layer.name], kind, wanted.preset, apart=apart)
    notes = (*_warnings(base, model, wanted), *_left_out(source))
    plan = replace(base, entries=entries, untie_head=False, warnings=notes)
    return plan, Types(types, *called(wanted, model, types, mixed=types != _types(model, usual, places)))


def _types(model: GgufModel, wished: Mapping[str, str], places: _Places) -> dict[str, str]:
    """Tensor -> the type that is wished for it, as far as llama.cpp allows."""
    types = {t.name: type_with_number(t, wished[t.name], wished) for t in model.tensors}
    _agree(places, types)
    return types


def called(
    wanted: FileType, model: GgufModel, types: Mapping[str, str], *, mixed: bool
) -> tuple[FileType, str]:
    """What a file is called: by the mixture, or where rules changed it by what it holds.

    Then its type is that of most weights, as llama.cpp guesses it, and the bits of a weight stand behind it:
    `Q4_K_S-3.92bpw`, as people call files of mixtures of their own.

    Args:
        wanted: the mixture.
        model: tensors of the file.
        types: their types.
        mixed: rules gave some tensors other types than the mixture.

    Returns:
        The file type for the metadata, and the word for the file's name.
    """
    if not mixed:
        return wanted, wanted.name.upper()
    weights: dict[str, int] = {}
    for tensor in model.tensors:
        weights[types[tensor.name]] = weights.get(types[tensor.name], 0) + math.prod(tensor.shape)
    most = TYPES[max(weights, key=weights.__getitem__)]
    pure = (most.preset or most.name).removeprefix(SCHEME_PREFIX).casefold()
    kind = wanted if wanted.base == most.name else FILE_TYPES.get(pure, wanted)
    nbytes = sum(TYPES[types[tensor.name]].nbytes(tensor.shape) for tensor in model.tensors)
    return kind, f"{kind.name.upper()}-{8 * nbytes / sum(weights.values()):.2f}bpw"


def _split_rules(
    layer_config: Mapping[str, Any] | None, source: ModelSource, places: _Places
) -> tuple[dict[str, str], dict[str, Any]]:
    """Rules for matrices that are no layers (the embedding) as tensor -> type, and the other rules."""
    tied = _tied_head(source)
    layers = {layer.alone for layer in source.layers if layer.name != tied}
    matrices = {
        source_name.removesuffix(".weight"): [tensor.name for tensor, _ in found]
        for source_name, found in places.items()
        if source_name not in layers and all(is_quantizable(_shape(t)) for t, _ in found)
    }
    outside: dict[str, str] = {}
    inside: dict[str, Any] = {}
    names = dict.fromkeys(layer.name for layer in source.layers)
    known = dict.fromkeys((*names, *matrices))
    scheme = PRESET_SCHEMES["GGUF:Q4_K_S"]
    for key, value in (layer_config or {}).items():
        match = _match(key, value, scheme, known)
        reached = [n for n in matrices if n in match.names] if match else []
        if not reached or (match and any(name in names for name in match.names)):
            inside[key] = value
            continue
        kind = type_of_scheme(match.rule.scheme) if match and match.rule.scheme else None
        for name in reached:
            dtype = source.tensors[f"{name}.weight"].dtype
            for tensor in matrices[name]:
                outside.setdefault(tensor, kind.name if kind else _KEPT_AS[dtype])
    return outside, inside


def _match(key: str, value: Any, scheme: Any, known: Mapping[str, None]) -> Match | None:
    """The rule with what it names; None when it names nothing, which the plan reports."""
    try:
        return match_rule(key, value, scheme, known)
    except ConfigError:
        return None


def _shape(tensor: GgufTensor) -> Shape:
    return Shape(tensor.name, tensor.shape)


def _tied_head(source: ModelSource) -> str | None:
    return source.head if source.tied_head else None


def _fixed(base: Plan, source: ModelSource, places: _Places) -> dict[str, str]:
    """Tensor -> type, where the user decided; what his choice of blocks leaves out is kept."""
    wishes: dict[str, dict[str | None, str]] = {}
    for layer in source.layers:
        entry = base.entries[layer.name]
        skipped = base.block_prefixes and layer.block is not None and entry.scheme is None
        decided = entry.fixed or (skipped and layer.role is not Role.ROUTER)
        for tensor, _ in places.get(layer.alone, ()):
            wish = _type(layer, entry, source) if decided and _may_choose(tensor, layer, entry) else None
            wishes.setdefault(tensor.name, {}).setdefault(wish, layer.name)
    for name, layers in wishes.items():
        if len(layers) > 1:
            first, second = list(layers.values())[:2]
            raise ConfigError(
                f"{first} and {second} are one tensor in a GGUF file ({name}) and need one type: name all of "
                "them in layer_config or ignore_layers, or none"
            )
    return {name: kind for name, layers in wishes.items() for kind in layers if kind is not None}


def _may_choose(tensor: GgufTensor, layer: Layer, entry: PlanEntry) -> bool:
    """Whether the user may choose the type of a tensor; llama.cpp reads some in 32 bits only."""
    if is_quantizable(_shape(tensor)):
        return True
    if entry.scheme is not None:
        raise ConfigError(
            f"{layer.name}: {entry.reason} wants {entry.label}, but llama.cpp reads {tensor.name} in 32 bits "
            "only; leave it out"
        )
    return False


def _type(layer: Layer, entry: PlanEntry, source: ModelSource) -> str:
    if entry.scheme is None:
        return _KEPT_AS[source.tensors[layer.tensor].dtype]
    kind = type_of_scheme(entry.scheme)
    if kind is None:
        raise ConfigError(f"{layer.name}: {entry.reason}: {entry.label} is no type of a GGUF file")
    return kind.name


def _agree(places: _Places, types: dict[str, str]) -> None:
    """One type for tensors that share a layer (a template may split one): the larger."""
    for found in places.values():
        kinds = {types[tensor.name] for tensor, _ in found}
        if len(kinds) > 1:
            widest = max(kinds, key=lambda name: TYPES[name].block_bytes / TYPES[name].block)
            for tensor, _ in found:
                types[tensor.name] = widest


def _entry(entry: PlanEntry, kind: GgufType, preset: str, *, apart: bool) -> PlanEntry:
    if apart:
        return PlanEntry(None, f"stored transposed, as {kind.name.upper()} without tuning", entry.fixed)
    if kind.scheme is None:
        kept = entry.reason if entry.scheme is None else f"stored as {kind.name.upper()}"
        return PlanEntry(None, kept, entry.fixed)
    reason = entry.reason if entry.fixed else f"{kind.name.upper()} in {preset}"
    return PlanEntry(kind.scheme, reason, entry.fixed)


def _left_out(source: ModelSource) -> list[str]:
    """Says that the file has no encoder, where the model has one."""
    outside = len(source.tensors.keys() - source.text_tensors.keys())
    if not outside or len(source.text_tensors) == len(source.tensors):
        return []
    return [f"the file holds the language model: {outside} tensors of encoders and projectors are not in it"]


def _warnings(base: Plan, model: GgufModel, wanted: FileType) -> tuple[str, ...]:
    """What the user may want to change: rules without effect, and rows that K-types cannot hold."""
    base_kind = TYPES[wanted.base]
    narrow = [t for t in model.tensors if is_quantizable(_shape(t)) and not base_kind.fits(t.shape[-1])]
    notes = [w for w in base.warnings if w.startswith("layer_config")]
    if narrow:
        share = sum(t.rows * t.shape[-1] for t in narrow)
        total = sum(t.rows * t.shape[-1] for t in model.tensors)
        notes.append(
            f"{len(narrow)} tensors ({share / total:.0%} of the weights) have rows that are no multiple of "
            f"{base_kind.block}: they get other types than {base_kind.name.upper()}, as in llama.cpp"
        )
    return tuple(notes)
