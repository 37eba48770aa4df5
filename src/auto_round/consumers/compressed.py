"""How engines read `compressed-tensors` configurations for one module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.consumers.fields import (
    FP8_STRATEGIES,
    CannotReadError,
    CompressedFields,
    Fields,
    Inputs,
    agreed,
    make_fields,
)
from auto_round.consumers.folder import Folder
from auto_round.consumers.modules import Module
from auto_round.facts.compressed import BYTES, FP8, MXFP4, MXFP6, MXFP8, NAIVE, NVFP4, PATTERN

_CLASSES = ("Linear", "FusedMoE", "RoutedExperts")

Group = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CompressedReader:
    """`ignore` by the parts of a module, then the first group with a target for it.

    Targets are names, expressions after `re:` that meet the beginning of a name, or `Linear`.
    Source: `should_ignore_layer` and `find_matched_target` in vLLM
    `vllm/model_executor/layers/quantization/compressed_tensors/utils.py` and in SGLang
    `python/sglang/srt/layers/quantization/compressed_tensors/utils.py`.

    Attributes:
        strict: SGLang: a module that no group is meant for is an error (vLLM keeps it in 16 bits), entries of
            `ignore` also meet the ends of names, and classes come before the parts of a fused module.
    """

    strict: bool

    def __call__(self, folder: Folder, module: Module) -> Fields | None:
        """Scheme of a module; None where it is not quantized.

        Raises:
            CannotReadError: the parts of a fused module differ, or no group is meant for it.
        """
        ignore = [str(entry) for entry in folder.quantization.get("ignore") or ()]
        if self._ignored(module.name, ignore):
            return None
        ignored = {part.name: self._ignored(part.name, ignore) for part in module.parts}
        if len(set(ignored.values())) > 1:
            raise CannotReadError(f"it fuses {module.name}, of which only some parts are ignored")
        if all(ignored.values()):
            return None
        if module.head:
            return self._found(folder, _by_name(folder, module.name), module.name)
        fused = _by_name(folder, module.name)
        by_class = _by_class(folder)
        if not module.experts and (fused is not None or (self.strict and by_class is not None)):
            return self._found(folder, fused or by_class, module.name)
        groups = {part.name: _by_name(folder, part.name) for part in module.parts}
        if not module.experts and not all(groups.values()):
            return self._found(folder, by_class, module.name)
        found = {name: self._found(folder, group or by_class, name) for name, group in groups.items()}
        return agreed(module, found)

    def _ignored(self, name: str, ignore: Iterable[str]) -> bool:
        ends = self.strict and any(
            name.endswith(f".{entry}") for entry in ignore if not entry.startswith(PATTERN)
        )
        return ends or _named(name, ignore)

    def _found(self, folder: Folder, group: Group | None, name: str) -> Fields | None:
        if group is not None:
            return _fields(folder, group, name)
        if self.strict and name.rpartition(".")[2] != "lm_head":
            raise CannotReadError(f"no config group has a target for {name}")
        return None


def _fields(folder: Folder, group: Group, name: str) -> Fields:
    weights = group.get("weights") or {}
    size = weights.get("group_size")
    strategy = str(weights.get("strategy") or ("channel" if size is None else "group"))
    in_blocks = strategy == "block"
    plain = make_fields(
        weights.get("num_bits"),
        -1 if size is None or in_blocks else size,
        weights.get("symmetric", True),
        name,
    )
    numbers = str(weights.get("type", "int"))
    stated = str(group.get("format") or folder.quantization.get("format") or "")
    form = (_float_form(plain, strategy, weights) if numbers == "float" else "") or stated
    return CompressedFields(
        plain.bits,
        plain.group_size,
        plain.sym,
        numbers,
        stated,
        strategy,
        BYTES if form == NAIVE and numbers == "int" else form,
        _block(weights) if in_blocks else None,
        _inputs(group.get("input_activations")),
    )


_GROUPS = {
    ("tensor_group", 4, 16): NVFP4,
    ("group", 4, 32): MXFP4,
    ("group", 6, 32): MXFP6,
    ("group", 8, 32): MXFP8,
}
"""Strategy, bits and group size of floats in groups -> how they are stored."""

_BYTE = "uint8"


def _float_form(fields: Fields, strategy: str, weights: Group) -> str:
    """How engines expect floats to be stored; empty where they know no such floats.

    Source: `_is_nvfp4_format`, `_is_mxfp4` and `_is_mxfp8` in vLLM's `compressed_tensors.py`.
    """
    if strategy in FP8_STRATEGIES:
        return FP8 if fields.bits == 8 else ""
    found = _GROUPS.get((strategy, fields.bits, fields.group_size), "")
    bytes_of_exponents = str(weights.get("scale_dtype")).removeprefix("torch.") == _BYTE
    return "" if found == MXFP8 and not bytes_of_exponents else found


def _block(weights: Group) -> tuple[int, int] | None:
    found = weights.get("block_structure")
    if isinstance(found, str):
        found = [int(n) for n in found.split("x") if n.isdigit()]
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
        return None
    return found[0], found[1]


def _inputs(said: Any) -> Inputs | None:
    """What flows in; None where it is left alone."""
    if not isinstance(said, Mapping) or not isinstance(width := said.get("num_bits"), int):
        return None
    size = said.get("group_size")
    return Inputs(
        width,
        str(said.get("type", "int")),
        str(said.get("strategy") or "tensor"),
        size if isinstance(size, int) else None,
        bool(said.get("symmetric", True)),
        bool(said.get("dynamic")),
    )


def _groups(folder: Folder) -> Iterator[Group]:
    groups = folder.quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group


def _by_name(folder: Folder, name: str) -> Group | None:
    return next((group for group in _groups(folder) if _named(name, _targets(group))), None)


def _by_class(folder: Folder) -> Group | None:
    return next((g for g in _groups(folder) if any(t in _CLASSES for t in _targets(g))), None)


def _targets(group: Group) -> list[str]:
    return [str(target) for target in group.get("targets") or ()]


def _named(name: str, entries: Iterable[str]) -> bool:
    return any(
        re.match(entry.removeprefix(PATTERN), name) if entry.startswith(PATTERN) else entry == name
        for entry in entries
    )
