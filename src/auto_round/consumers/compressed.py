"""How engines read `compressed-tensors` configurations for one module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from auto_round.consumers.fields import CannotReadError, Fields, agreed, make_fields
from auto_round.consumers.folder import Folder
from auto_round.consumers.modules import Module

_CLASSES = ("Linear", "FusedMoE")
_REGEX = "re:"


def read_compressed(folder: Folder, module: Module) -> Fields | None:
    """Scheme of a module: `ignore` by its parts, then the first group with a target for it.

    Targets are names, expressions after `re:` that meet the beginning of a name, or `Linear`.
    Source: vLLM `vllm/model_executor/layers/quantization/compressed_tensors/utils.py`
    (`should_ignore_layer`, `find_matched_target`); SGLang has the same.

    Raises:
        CannotReadError: the parts of a fused module differ, or no group is meant for it.
    """
    config = folder.quantization
    ignore = [str(entry) for entry in config.get("ignore") or ()]
    names = [part.name for part in module.parts]
    ignored = {name: _named(name, ignore) for name in names}
    if len(set(ignored.values())) > 1:
        raise CannotReadError(f"it fuses {module.name}, of which only some parts are ignored")
    if all(ignored.values()):
        return None
    return agreed(module, {name: _group(folder, name) for name in names})


def _group(folder: Folder, name: str) -> Fields | None:
    groups = folder.quantization.get("config_groups")
    candidates = list(groups.values()) if isinstance(groups, Mapping) else []
    by_name = [g for g in candidates if _named(name, _targets(g))]
    by_class = [g for g in candidates if any(target in _CLASSES for target in _targets(g))]
    for group in (*by_name, *by_class):
        weights = group.get("weights") or {}
        size = weights.get("group_size")
        bits, sym = weights.get("num_bits"), weights.get("symmetric", True)
        return make_fields(bits, -1 if size is None else size, sym, name)
    if name.rpartition(".")[2] == "lm_head":
        return None
    raise CannotReadError(f"no config group has a target for {name}")


def _targets(group: Mapping[str, Any]) -> list[str]:
    return [str(target) for target in group.get("targets") or ()]


def _named(name: str, entries: Iterable[str]) -> bool:
    return any(
        re.match(entry.removeprefix(_REGEX), name) if entry.startswith(_REGEX) else entry == name
        for entry in entries
    )
