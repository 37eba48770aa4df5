"""Configurations of GPTQ and AWQ checkpoints: the words of AutoGPTQ, GPTQModel and AutoAWQ in this package's.

Transformers hands such a checkpoint to this package when an `AutoRoundConfig` is passed. It then writes
`auto-round` over `quant_method` and `auto_round:gptq` or `auto_round:awq` into `packing_format`
(`AutoRoundConfig.from_dict` in Transformers 5.23).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.layouts.layout import Layout
from auto_round.layouts.table import PACKING_FORMAT, layout_of

GPTQ, AWQ = "gptq", "awq"

_GPTQ_KEYS = ("desc_act", "checkpoint_format", "true_sequential", "damp_percent")
"""Keys that GPTQ checkpoints have and those of `auto-round` have not."""

_AWQ_KEYS = ("zero_point", "w_bit", "q_group_size", "version", "modules_to_not_convert")

_SPELLINGS = {"bits": ("w_bit", "bits"), "group_size": ("q_group_size", "group_size")}
"""Older spellings come first: Transformers fills in the newer ones where they are missing. Source:
`from_config` of vLLM's and SGLang's AWQ loaders."""

Rule = Mapping[str, Any]


def foreign_method(config: Mapping[str, Any]) -> str | None:
    """`gptq` or `awq` where a configuration is of such a checkpoint, else None."""
    method = str(config.get("quant_method", ""))
    packing = str(config.get(PACKING_FORMAT, ""))
    if method in (GPTQ, AWQ):
        return method
    if packing == f"auto_round:{AWQ}" and any(key in config for key in _AWQ_KEYS):
        return AWQ
    if packing == f"auto_round:{GPTQ}" and any(key in config for key in _GPTQ_KEYS):
        return GPTQ
    return None


def foreign_layout(config: Mapping[str, Any], method: str) -> Layout:
    """Order of the stored bytes.

    Raises:
        UnsupportedError: an order that this package does not read (`marlin`, `gemv`, ...).
    """
    stated = {**config, "quant_method": method}
    if method == GPTQ and "checkpoint_format" not in config and config.get("format"):
        stated["checkpoint_format"] = config["format"]  # GPTQModel's newer spelling
    try:
        return layout_of(stated)
    except ConfigError as error:
        raise UnsupportedError(
            f"this {method} checkpoint cannot be loaded", [Refusal("auto_round", str(error))]
        ) from error


def foreign_top(config: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Fields of a scheme at the top, under this package's names."""
    top = {
        field: next(config[key] for key in keys if config.get(key) is not None)
        for field, keys in _SPELLINGS.items()
        if any(config.get(key) is not None for key in keys)
    }
    if method == AWQ:
        return {**top, "sym": not config.get("zero_point", True)}
    return {**top, "sym": bool(config.get("sym", True))}


def dynamic_rule(dynamic: Mapping[str, Any], name: str) -> Rule | None:
    """Fields that GPTQModel's `dynamic` changes for a layer; None for one that is kept.

    The first pattern that meets the name's beginning counts; `-:` keeps, `+:` and nothing change.
    Source: GPTQModel `gptqmodel/quantization/config.py` (`_resolve_dynamic_override`); vLLM and SGLang have
    the same in `get_dynamic_override`.

    Raises:
        ConfigError: a pattern that is not one.
    """
    for key, fields in dynamic.items():
        try:
            met = re.match(key.removeprefix("-:").removeprefix("+:"), name)
        except re.error as error:
            raise ConfigError(
                f'dynamic of this checkpoint has the key "{key}", expected a regular expression ({error})'
            ) from error
        if met:
            return None if key.startswith("-:") else dict(fields or {})
    return {}


def is_listed(name: str, listed: tuple[str, ...]) -> bool:
    """Whether `modules_in_block_to_quantize` names a layer, by its end or in full.

    Source: Optimum 1.24 `optimum/gptq/quantizer.py` (`convert_model`).
    """
    return any(f".{entry}." in f".{name}." for entry in listed)
