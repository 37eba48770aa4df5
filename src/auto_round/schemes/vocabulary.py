"""Words of a scheme: field names with their types, spellings of data types, recipes of mixed presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.errors import ConfigError, nearest

BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
"""Widths a scheme may name; 16 and more mean that the layer is kept as it is."""

SCALE_DTYPES: dict[str, dict[str, Any]] = {
    **{name: {"scale_dtype": "float16"} for name in ("float16", "fp16")},
    **{name: {"scale_dtype": "bfloat16"} for name in ("bfloat16", "bf16")},
    **{name: {"scale_dtype": "float32"} for name in ("float32", "fp32")},
}
"""Accepted spellings of the step's dtype."""

DATA_TYPES: dict[str, dict[str, Any]] = {
    "int": {"data_type": "int"},
    "int_sym": {"data_type": "int", "sym": True},
    "int_asym": {"data_type": "int", "sym": False},
    **{f"int{b}": {"data_type": "int", "bits": b} for b in range(2, 9)},
    **{
        name: {"data_type": "fp", "bits": 16}
        for name in ("float", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32")
    },
    "fp": {"data_type": "fp"},
    "fp8": {"data_type": "fp", "bits": 8},
    "fp_block": {"data_type": "fp_block"},
    "mx_fp": {"data_type": "mx_fp"},
    "mx_fp_rceil": {"data_type": "mx_fp_rceil"},
    **{f"mx_fp{b}": {"data_type": "mx_fp", "bits": b} for b in (4, 6, 8)},
    "mx_int": {"data_type": "mx_int"},
    "mx_int4": {"data_type": "mx_int", "bits": 4},
    "nv_fp": {"data_type": "nv_fp"},
    "nv_fp4": {"data_type": "nv_fp", "bits": 4},
    "nv_fp4_with_static_gs": {"data_type": "nv_fp4_with_static_gs", "bits": 4},
    "nvfp4_v2": {"data_type": "nvfp4_v2", "bits": 4},
    "int_gguf": {"data_type": "int_gguf"},
    "int_asym_float_zp": {"data_type": "int_asym_float_zp", "sym": False},
    "int_sym_dq": {"data_type": "int_sym_dq", "sym": True},
    "int_asym_dq": {"data_type": "int_asym_dq", "sym": False},
}
"""Spellings of `data_type` and the fields that each decides; a name that implies bits wins over `bits`."""

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "W4A16_MIXED": {"linear": {"bits": 8}, "shared expert": {"bits": 8}, "head": {"bits": 8}},
}
"""Mixed presets: role of a layer (values of `models.layer.Role`) -> fields that differ from the scheme."""

FIELD_TYPES: dict[str, tuple[type, bool]] = {
    "bits": (int, False),
    "group_size": (int, False),
    "sym": (bool, False),
    "data_type": (str, False),
    "act_bits": (int, True),
    "act_group_size": (int, True),
    "act_sym": (bool, True),
    "act_data_type": (str, True),
    "act_dynamic": (bool, True),
    "super_bits": (int, True),
    "super_group_size": (int, True),
    "scale_dtype": (str, False),
    "recipe": (str, True),
}
"""Type of each field, and whether None stands for "not given"."""


def check_type(name: str, value: Any) -> None:
    """Refuse a value of the wrong type for the field `name`.

    Raises:
        ConfigError: it is of the wrong type.
    """
    kind, optional = FIELD_TYPES[name]
    if value is None and optional:
        return
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = {int: "a whole number", bool: "True or False", str: "a text"}[kind]
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def spelled(field: str, value: Any, table: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Row of `table` for one of its spellings, case and a leading `torch.` ignored.

    Raises:
        ConfigError: no such row; names the nearest ones.
    """
    known = {name.casefold(): name for name in table}
    key = str(value).casefold().removeprefix("torch.")
    if key not in known:
        raise ConfigError(f"unknown {field} {value!r}; {nearest(str(value), table)}")
    return table[known[key]]
