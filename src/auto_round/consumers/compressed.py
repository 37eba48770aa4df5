"""How engines read `compressed-tensors` configurations for one module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.consumers.fields import (
    FLOAT_BITS,
    CannotReadError,
    CompressedFields,
    Fields,
    agreed,
    make_fields,
)
from auto_round.consumers.folder import Folder
from auto_round.consumers.modules import Module

_CLASSES = ("Linear", "FusedMoE", "RoutedExperts")
_REGEX = "re:"
_TOKEN = "token"

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
            name.endswith(f".{entry}") for entry in ignore if not entry.startswith(_REGEX)
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
    inputs = group.get("input_activations") or {}
    size = weights.get("group_size")
    plain = make_fields(
        weights.get("num_bits"), -1 if size is None else size, weights.get("symmetric", True), name
    )
    width = inputs.get("num_bits", FLOAT_BITS)
    by_token = (
        bool(inputs.get("dynamic")) and inputs.get("symmetric", True) and inputs.get("strategy") == _TOKEN
    )
    return CompressedFields(
        plain.bits,
        plain.group_size,
        plain.sym,
        str(weights.get("type", "int")),
        str(group.get("format") or folder.quantization.get("format") or ""),
        width if isinstance(width, int) else FLOAT_BITS,
        by_token,
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
        re.match(entry.removeprefix(_REGEX), name) if entry.startswith(_REGEX) else entry == name
        for entry in entries
    )
