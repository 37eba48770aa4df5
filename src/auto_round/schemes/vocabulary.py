"""Words that fields of a scheme may hold: widths, dtypes, mixed presets. Number types: `number_types.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.errors import ConfigError, nearest
from auto_round.facts.layer import Role

KEPT_BITS = 16
"""Width from which numbers are no codes: a layer of so many bits is kept as it is, inputs are not rounded."""
BITS = (2, 3, 4, 5, 6, 7, 8, KEPT_BITS, 2 * KEPT_BITS)
"""Widths a scheme may name."""

SCALE_DTYPE_SPELLINGS: dict[str, dict[str, Any]] = {
    **{name: {"scale_dtype": "float16"} for name in ("float16", "fp16")},
    **{name: {"scale_dtype": "bfloat16"} for name in ("bfloat16", "bf16")},
    **{name: {"scale_dtype": "float32"} for name in ("float32", "fp32")},
}
"""Accepted spellings of the step's dtype."""

MIXED_PRESETS: dict[str, dict[Role, dict[str, Any]]] = {
    "W4A16_MIXED": {Role.LINEAR: {"bits": 8}, Role.SHARED_EXPERT: {"bits": 8}, Role.HEAD: {"bits": 8}},
}
"""Presets of several schemes: role of a layer -> fields that differ from the scheme."""


def spelled(field: str, value: Any, table: Mapping[str, dict[Any, Any]]) -> dict[str, Any]:
    """Row of `table` for one of its spellings; case, `_` and a leading `torch.` are ignored.

    Documents write `mxfp`, `mxfp_rceil` and `nvfp4` for what folders call `mx_fp` and so on.

    Raises:
        ConfigError: no such row; names the nearest ones.
    """
    known = {_folded(name): name for name in table}
    key = _folded(str(value))
    if key not in known:
        raise ConfigError(f"unknown {field} {value!r}; {nearest(str(value), table)}")
    return table[known[key]]


def _folded(word: str) -> str:
    return word.casefold().removeprefix("torch.").replace("_", "")
