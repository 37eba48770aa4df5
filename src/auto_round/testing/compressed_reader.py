"""A second reader of compressed-tensors folders: whom a configuration means, and what the tensors hold.

It shares no code with the exporter and the layouts: every rule is written from the reader that it stands for,
and every code is cut out of one long whole number.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from auto_round.testing.failure import require

_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Two of vLLM's `packed_modules_mapping`."""

_EXPERT = ("gate_proj", "up_proj", "down_proj")


def in_library(config: Mapping[str, Any], name: str, packed: Collection[str]) -> dict[str, Any] | None:
    """compressed-tensors `match_named_modules` and `match_targets`: names, then expressions, then classes."""
    if _named(name, config["ignore"]):
        return None
    groups = list(config["config_groups"].values())
    for rule in (_exact, _expression, _linear):
        for group in groups:
            if any(rule(name, target) for target in group["targets"]):
                return _fields(config, group)
    return None


def in_vllm(config: Mapping[str, Any], name: str, packed: Collection[str]) -> dict[str, Any] | None:
    """VLLM `should_ignore_layer` and `find_matched_target`; for experts the matrices of the first one."""
    parts = _parts(name)
    ignored = {_named(part, config["ignore"]) for part in parts}
    require(len(ignored) == 1, f"vLLM: some but not all parts of {name} are ignored")
    if ignored == {True}:
        return None
    found = [in_library(config, part, packed) for part in parts]
    require(all(one == found[0] for one in found), f"vLLM: the parts of {name} have different schemes")
    return found[0]


def read_weight(parts: Mapping[str, Tensor], fields: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
    """Weight `[out, in]` float32 of the stored tensors: `(number - zero) * scale`, rounded once.

    Args:
        parts: stored tensors by suffix.
        fields: what `in_library` found.
        shape: `[out, in]`.
    """
    n_out, n_in = shape
    half = 1 << (fields["bits"] - 1)
    zeros = [[0] * parts["weight_scale"].shape[1] for _ in range(n_out)]
    if fields["format"] == "int-quantized":
        numbers = parts["weight"].tolist()
    else:
        require(parts["weight_shape"].tolist() == [n_out, n_in], "weight_shape is another shape")
        numbers = [_numbers(row, fields["bits"], n_in, half) for row in parts["weight_packed"].tolist()]
        if not fields["sym"]:
            columns = parts["weight_zero_point"].t().tolist()
            by_group = [_numbers(column, fields["bits"], n_out, half) for column in columns]
            zeros = [[column[o] for column in by_group] for o in range(n_out)]
    width = n_in if fields["group_size"] == -1 else fields["group_size"]
    plain = [[numbers[o][i] - zeros[o][i // width] for i in range(n_in)] for o in range(n_out)]
    steps = parts["weight_scale"].to(torch.float32)[:, torch.arange(n_in) // width]
    return torch.tensor(plain, dtype=torch.float32) * steps


def _numbers(words: Sequence[int], bits: int, count: int, half: int) -> list[int]:
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i) & ((1 << bits) - 1)) - half for i in range(count)]


def _fields(config: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    weights = group["weights"]
    return {
        "bits": weights["num_bits"],
        "group_size": {"channel": -1, "group": weights["group_size"]}[weights["strategy"]],
        "sym": weights["symmetric"],
        "data_type": weights["type"],
        "format": group["format"] or config["format"],
        "input": group["input_activations"],
    }


def _named(name: str, entries: Collection[str]) -> bool:
    return any(_exact(name, entry) or _expression(name, entry) for entry in entries)


def _exact(name: str, target: str) -> bool:
    return name == target


def _expression(name: str, target: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None


def _linear(name: str, target: str) -> bool:
    return target == "Linear"


def _parts(name: str) -> list[str]:
    """Names that vLLM asks about instead of that of a matrix it has merged."""
    experts = re.fullmatch(r"(.*\.experts)(\.routed_experts)?", name)
    if experts:
        return [f"{experts[1]}.0.{part}" for part in _EXPERT]
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" for part in _MERGED.get(last, (last,))] if parent else [name]
