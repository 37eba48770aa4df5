"""A second reader of `quantization_config`, by the rules of Transformers, vLLM and SGLang."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = ("bits", "group_size", "sym", "data_type")

_SPECIAL = frozenset("*+?^$()[]{}|\\")
"""Characters that make a key a pattern; a dot alone does not."""


def fields_of(config: Mapping[str, Any], name: str, *, full_match: bool) -> dict[str, Any] | None:
    """Fields that a reader of the config uses for one layer; None when it leaves the layer alone.

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


def _quantized(fields: dict[str, Any]) -> dict[str, Any] | None:
    return None if fields["bits"] >= 16 else fields


def _inside(name: str, prefixes: str | Sequence[str]) -> bool:
    listed = prefixes.split(",") if isinstance(prefixes, str) else prefixes
    return any(name.startswith(prefix.strip()) for prefix in listed)
