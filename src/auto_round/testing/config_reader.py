"""A second reader of `quantization_config`, by the rules of Transformers, vLLM, SGLang and GPTQModel.

It shares no code with the exporters: each rule is written from the reader that it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from auto_round.testing import compressed_reader
from auto_round.testing.failure import require

FIELDS = ("bits", "group_size", "sym", "data_type")

Found = dict[str, Any] | None
"""Fields that a reader uses for one layer; None when it leaves the layer alone."""

Reader = Callable[[Mapping[str, Any], str, Collection[str]], Found]
"""Configuration, name of a layer, names of all layers with packed tensors -> what is read."""

_SPECIAL = frozenset("*+?^$()[]{}|\\")
"""Characters that make a key a pattern; a dot alone does not."""

_HEAD = "lm_head"

_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Two of vLLM's `packed_modules_mapping`."""


def fields_of(config: Mapping[str, Any], name: str, *, full_match: bool) -> Found:
    """Fields that a reader of an `auto-round` config uses for one layer; None when it leaves the layer alone.

    Args:
        config: the `quantization_config`.
        name: name of the layer.
        full_match: patterns have to cover the whole name (SGLang) instead of being found in it.
    """
    top = {field: config[field] for field in FIELDS}
    extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config", {})
    if name in extra:
        return _quantized({**top, **extra[name]})
    prefixes = config.get("block_name_to_quantize")
    if prefixes is not None and not _inside(name, prefixes):
        return None
    find = re.fullmatch if full_match else re.search
    for pattern, fields in extra.items():
        if _SPECIAL.intersection(pattern) and find(pattern, name):
            return _quantized({**top, **fields})
    return top


def _quantized(fields: dict[str, Any]) -> Found:
    return None if fields["bits"] >= 16 else fields


def _inside(name: str, prefixes: str | Sequence[str]) -> bool:
    listed = prefixes.split(",") if isinstance(prefixes, str) else prefixes
    return any(name.startswith(prefix.strip()) for prefix in listed)


def _search(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    return fields_of(config, name, full_match=False)


def inc_in_vllm(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    """VLLM 0.32 `INCConfig.get_quant_method` and `INCConfigParser`: merged matrices by their parts."""
    extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config", {})
    if name in extra and extra[name].get("bits", 16) >= 16:
        return None
    if name in extra or not name.endswith(tuple(_MERGED)):
        return fields_of(config, name, full_match=False)
    found = [fields_of(config, part, full_match=False) for part in _parts(name)]
    require(all(one == found[0] for one in found), f"vLLM: the parts of {name} have different schemes")
    return found[0]


def _fullmatch(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    return fields_of(config, name, full_match=True)


def gptq_in_vllm(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    """VLLM `gptq_utils.get_linear_quant_method`, and `get_moe_quant_method` for the experts of a block."""
    if name == _HEAD and not config.get("lm_head", False):
        return None
    if not re.search(r"\.experts(\.routed_experts)?$", name):
        groups = config.get("modules_in_block_to_quantize") or [sorted(packed)]
        listed = [entry for group in groups for entry in group]
        found = {any(entry in part for entry in listed) for part in _parts(name)}
        require(len(found) == 1, f"vLLM: some but not all parts of {name} are quantized")
        if found == {False}:
            return None
    return _dynamic(config, name, list(config.get("dynamic", {}).items()))


def gptq_in_gptqmodel(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    """GPTQModel `BaseQuantizeConfig.dynamic`, which asks negative rules first; the head as `lm_head` says."""
    if name == _HEAD and not config.get("lm_head", False):
        return None
    rules = config.get("dynamic", {}).items()
    return _dynamic(config, name, sorted(rules, key=lambda rule: not rule[0].startswith("-")))


def gptq_in_optimum(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    """Optimum `GPTQQuantizer.convert_model`: layers of one list of blocks, by the ends of their names."""
    listed = [entry for group in config.get("modules_in_block_to_quantize") or [] for entry in group]
    if not name.startswith(config["block_name_to_quantize"] + "."):
        return None
    if listed and not any(name.endswith(entry) for entry in listed):
        return None
    return _top(config)


def awq_in_vllm(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    """VLLM `quant_utils.is_layer_skipped(..., skip_with_substr=True)`."""
    if name == _HEAD and not config.get("lm_head", False):
        return None
    entries = config.get("modules_to_not_convert", ())
    skipped = {any(entry in part for entry in entries) for part in _parts(name)}
    require(len(skipped) == 1, f"vLLM: some but not all parts of {name} are quantized")
    return None if skipped == {True} else _top(config)


def gptq_in_sglang(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    """SGLang `quantization/utils.py`, `get_linear_quant_method`: `dynamic` alone, by the merged names too."""
    if name == _HEAD and not config.get("lm_head", False):
        return None
    return _dynamic(config, name, list(config.get("dynamic", {}).items()))


def awq_in_sglang(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    """SGLang `quantization/awq.py`, `is_layer_skipped_awq`; AutoAWQ does so too, without merged matrices."""
    if name == _HEAD:
        return None
    return None if any(entry in name for entry in config.get("modules_to_not_convert", ())) else _top(config)


def awq_in_transformers(config: Mapping[str, Any], name: str, packed: Collection[str]) -> Found:
    """Transformers `quantizers_utils.should_convert_module`; the head is always skipped."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    entries = [*config.get("modules_to_not_convert", ()), _HEAD]
    if any(re.match(rf"(?:{entry}){boundary}", name) or name.endswith(entry) for entry in entries):
        return None
    return _top(config)


READERS: Mapping[str, Mapping[str, Reader]] = MappingProxyType(
    {
        "auto-round": {"Transformers": _search, "vLLM": inc_in_vllm, "SGLang": _fullmatch},
        "gptq": {"vLLM": gptq_in_vllm, "SGLang": gptq_in_sglang, "GPTQModel": gptq_in_gptqmodel},
        "awq": {
            "vLLM": awq_in_vllm,
            "SGLang": awq_in_sglang,
            "Transformers": awq_in_transformers,
            "GPTQModel": gptq_in_gptqmodel,
        },
        "compressed-tensors": {
            "compressed-tensors": compressed_reader.in_library,
            "vLLM": compressed_reader.in_vllm,
        },
    }
)
"""`quant_method` -> readers that understand any plan in it. optimum knows one scheme only."""

MERGING = ("vLLM", "SGLang")
"""Readers that ask for merged matrices; SGLang those of GPTQ and AWQ folders only, as a whole."""


def merged_names(names: Collection[str]) -> dict[str, list[str]]:
    """Matrices that vLLM computes with in one -> the layers in them; not for single experts."""
    found: dict[str, list[str]] = {}
    for name in names:
        container = re.match(r"(.*\.experts)\.\d+\.", name)
        if container:
            found.setdefault(container[1], []).append(name)
            found.setdefault(f"{container[1]}.routed_experts", []).append(name)
            continue
        parent, _, last = name.rpartition(".")
        for merged, parts in _MERGED.items():
            if last == parts[0] and all(f"{parent}.{part}" in names for part in parts):
                found[f"{parent}.{merged}"] = [f"{parent}.{part}" for part in parts]
    return found


def _parts(name: str) -> list[str]:
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" for part in _MERGED.get(last, (last,))]


def _dynamic(config: Mapping[str, Any], name: str, rules: Sequence[tuple[str, Mapping[str, Any]]]) -> Found:
    for pattern, fields in rules:
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return None if pattern.startswith("-:") else {**_top(config), **fields}
    return _top(config)


def _top(config: Mapping[str, Any]) -> dict[str, Any]:
    return {field: config[field] for field in FIELDS if field in config}
