"""Scheme: the numbers that describe how one layer is stored, and the table of preset names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from auto_round.errors import ConfigError, Refusal, UnsupportedError, nearest
from auto_round.facts.layer import Role
from auto_round.schemes.number_types import NUMBER_TYPES, inputs_of, spellings, weights_of
from auto_round.schemes.type_columns import InputFields
from auto_round.schemes.vocabulary import BITS, KEPT_BITS, MIXED_PRESETS, SCALE_DTYPE_SPELLINGS, spelled

if TYPE_CHECKING:
    from auto_round.numerics.activation_float import InputFormat
    from auto_round.numerics.format import Format

_GROUPLESS = -1


@dataclass(frozen=True, slots=True, eq=False)
class QuantizationScheme(Mapping[str, Any]):
    """How a layer is stored. Reads like a dictionary: `scheme["bits"]`, `dict(scheme)`, `**scheme`.

    Two schemes are equal when their fields are; `act_*` fields are left out of the comparison when neither
    side quantizes activations.

    Attributes:
        bits: width of a weight's code, 2 to 8; 16 or 32 keeps the layer as it is.
        group_size: weights that share a step; -1 one step a row (output channel), 0 one a tensor.
        sym: signed full range without zero point, or unsigned with one.
        data_type: number type, a row of `NUMBER_TYPES` or one that is not there yet: "int", "mx_fp", ...
        act_bits: width of activations; None or 16 leaves them alone.
        act_group_size: activations that share a step; -1 one step a token. None for `group_size`.
        act_sym: as `sym`, for activations; None for `sym`.
        act_data_type: as `data_type`, for activations; None for `data_type`.
        act_dynamic: activation steps measured at run time rather than at calibration; None for True.
        super_bits: width of the quantized steps of two-level formats.
        super_group_size: groups in a super-block of two-level formats.
        scale_dtype: dtype in which steps are stored: "float16", "bfloat16" or "float32".
        recipe: row of `MIXED_PRESETS` that gives some roles other fields; None for one scheme everywhere.

    Raises:
        ConfigError: a field of the wrong type or outside of its range.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    act_bits: int | None = None
    act_group_size: int | None = None
    act_sym: bool | None = None
    act_data_type: str | None = None
    act_dynamic: bool | None = None
    super_bits: int | None = None
    super_group_size: int | None = None
    scale_dtype: str = "float16"
    recipe: str | None = None

    def __post_init__(self) -> None:
        for name in FIELD_TYPES:
            check_type(name, self[name])
        if self.bits not in BITS:
            raise ConfigError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group_size < _GROUPLESS:
            raise ConfigError(f"group_size must be -1 (row), 0 (tensor) or positive, got {self.group_size}")
        for prefix in ("", "act_"):
            self._settle_type(prefix)
        if spelled("scale_dtype", self.scale_dtype, SCALE_DTYPE_SPELLINGS)["scale_dtype"] != self.scale_dtype:
            raise ConfigError(f'scale_dtype must be spelled out here, got "{self.scale_dtype}"')
        if self.recipe is not None:
            spelled("recipe", self.recipe, MIXED_PRESETS)

    def _settle_type(self, prefix: str) -> None:
        """Take over what another spelling of a number type says: name, and bits or symmetry where it does."""
        name = f"{prefix}data_type"
        if self[name] is None:
            return
        meant = spelled(name, self[name], spellings())
        if meant["data_type"] != self[name]:
            for field, value in meant.items():
                object.__setattr__(self, prefix + field, value)

    def __getitem__(self, key: str) -> Any:
        if key not in FIELD_TYPES:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(FIELD_TYPES)

    def __len__(self) -> int:
        return len(FIELD_TYPES)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, QuantizationScheme) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        weights = (self.bits, self.group_size, self.sym, self.data_type, self.scale_dtype, self.recipe)
        levels = (self.super_bits, self.super_group_size)
        if not self.act_quantized:
            return (*weights, *levels)
        acts = (self.act_bits, self.act_group_size, self.act_sym, self.act_data_type, self.act_dynamic)
        return (*weights, *levels, *acts)

    @property
    def quantized(self) -> bool:
        """Whether weights are stored in fewer than 16 bits."""
        return self.bits < KEPT_BITS

    @property
    def act_quantized(self) -> bool:
        """Whether activations are quantized too."""
        return self.act_bits is not None and self.act_bits < KEPT_BITS

    @property
    def presets(self) -> tuple[str, ...]:
        """Names of the presets that equal this scheme, in table order."""
        return tuple(name for name, scheme in PRESET_SCHEMES.items() if scheme == self)

    @property
    def label(self) -> str:
        """Short description for people, for example `W4 g128 sym`."""
        if not self.quantized:
            return "16 bits"
        row = NUMBER_TYPES.get(self.data_type)
        if row is not None and row.blocks and not isinstance(fmt := weights_of(self), Refusal):
            return fmt.name.removesuffix("_gguf").upper()
        words = [f"W{self.bits}"]
        words += {_GROUPLESS: ["per row"], 0: ["per tensor"]}.get(self.group_size, [f"g{self.group_size}"])
        words += [self.data_type] if self.data_type != "int" else []
        words.append("sym" if self.sym else "asym")
        words += [f"A{self.act_bits}"] if self.act_quantized else []
        words += [self.scale_dtype] if self.scale_dtype != "float16" else []
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Fields that are set, in declaration order; JSON-ready."""
        return {k: v for k, v in self.items() if v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationScheme:
        """Scheme of a dictionary; missing fields take their defaults.

        Raises:
            ConfigError: an unknown field, or a value of the wrong type or outside of its range.
        """
        return _merge(cls(), values)

    def for_role(self, role: Role) -> QuantizationScheme:
        """The scheme that a layer of this role gets."""
        changes = MIXED_PRESETS[self.recipe].get(role, {}) if self.recipe else {}
        return replace(self, recipe=None, **changes) if self.recipe else self

    @property
    def inputs(self) -> InputFields | None:
        """What is said of the layer's inputs; None when they are left alone."""
        if self.act_bits is None or not self.act_quantized:
            return None
        return InputFields(
            self.act_data_type or self.data_type,
            self.act_bits,
            self.group_size if self.act_group_size is None else self.act_group_size,
            self.sym if self.act_sym is None else self.act_sym,
            self.act_dynamic is not False,
        )

    def weight_format(self) -> Format | None:
        """Numeric format of the weights; None when they are kept as they are.

        Raises:
            UnsupportedError: the scheme is known but cannot be computed yet.
        """
        if not self.quantized and not self.act_quantized:
            return None
        found = _formats(self)
        if isinstance(found, Refusal):
            if found.remedy:  # fields that do not go together: other schemes are no help
                raise UnsupportedError(f"there is no scheme {self.label}", [found])
            name = " / ".join(self.presets) or self.label
            raise UnsupportedError(
                f"scheme {name} is not there yet; use one of {', '.join(integer_presets())}", [found]
            )
        return found[0]

    def activation_format(self) -> InputFormat | None:
        """What the layer's input is rounded to; None when it is left alone.

        Raises:
            UnsupportedError: the scheme is known but cannot be computed yet.
        """
        if not self.act_quantized:
            return None
        found = _formats(self)
        if isinstance(found, Refusal):
            raise UnsupportedError(f"scheme {self.label} is not there yet", [found])
        return found[1]


FIELD_TYPES: dict[str, tuple[type, bool]] = {
    name: ((get_args(hint) or (hint,))[0], bool(get_args(hint)))
    for name, hint in get_type_hints(QuantizationScheme).items()
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


def _formats(scheme: QuantizationScheme) -> tuple[Format, InputFormat | None] | Refusal:
    """Formats of weights and inputs of a scheme that quantizes something, or why they are not there yet."""
    if not scheme.quantized:
        return Refusal("activations", "they are quantized with the weights only", "give bits of 2 to 8 too")
    weights, fields_of_inputs = weights_of(scheme), scheme.inputs
    if isinstance(weights, Refusal) or fields_of_inputs is None:
        return weights if isinstance(weights, Refusal) else (weights, None)
    inputs = inputs_of(fields_of_inputs)
    return inputs if isinstance(inputs, Refusal) else (weights, inputs)


def names_group_size(value: object) -> bool:
    """Whether a scheme as a user wrote it says how large groups are.

    A preset's name does where the size is in it (`W2A16G64`), or a part of the number type (GGUF, MXFP4).
    """
    if isinstance(value, QuantizationScheme):
        return True
    if isinstance(value, Mapping):
        return value.get("group_size") is not None
    name = str(value).strip().upper()
    preset = PRESET_SCHEMES.get(name)
    return preset is None or preset.data_type != "int" or name.endswith(f"G{preset.group_size}")


def _merge(base: QuantizationScheme, values: Mapping[str, Any]) -> QuantizationScheme:
    """`base` with the given fields replaced; None means not given; `data_type` wins over `bits` and `sym`."""
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in FIELD_TYPES:
            raise ConfigError(f"unknown scheme field {name!r}; {nearest(str(name), FIELD_TYPES)}")
        if value is not None:
            given[name] = value
    for name, known in (("data_type", spellings()), ("scale_dtype", SCALE_DTYPE_SPELLINGS)):
        if name in given:
            given |= spelled(name, given[name], known)
    if "act_data_type" in given:
        fields = spelled("act_data_type", given["act_data_type"], spellings())
        given |= {f"act_{name}": value for name, value in fields.items()}
    if "data_type" not in given and not base.quantized and given.get("bits", KEPT_BITS) != KEPT_BITS:
        given["data_type"] = "int"
    if given.get("bits") in (KEPT_BITS, 2 * KEPT_BITS):  # a layer that is kept is kept with its inputs
        given.setdefault("act_bits", KEPT_BITS)
    return replace(base, **given)


def _row(bits: int, group_size: int, data_type: str = "int", **others: Any) -> QuantizationScheme:
    return QuantizationScheme(bits=bits, group_size=group_size, data_type=data_type, **others)


def _dynamic(act_bits: int, act_group_size: int, act_data_type: str) -> dict[str, Any]:
    return {
        "act_bits": act_bits,
        "act_group_size": act_group_size,
        "act_sym": True,
        "act_data_type": act_data_type,
        "act_dynamic": True,
    }


_Q4_1: dict[str, Any] = {"data_type": "int_asym_float_zp", "sym": False}
_K_ASYM: dict[str, Any] = {"data_type": "int_asym_dq", "sym": False, "super_bits": 6, "super_group_size": 8}
_Q2_K = QuantizationScheme(2, 16, sym=False, data_type="int_asym_dq", super_bits=4, super_group_size=16)
_Q3_K = QuantizationScheme(3, 16, data_type="int_sym_dq", super_bits=6, super_group_size=16)

PRESET_SCHEMES: dict[str, QuantizationScheme] = {
    "W4A16": _row(4, 128),
    "W2A16": _row(2, 128),
    "W2A16G64": _row(2, 64),
    "W2A16G32": _row(2, 32),
    "W3A16": _row(3, 128),
    "W5A16": _row(5, 128),
    "W6A16": _row(6, 128),
    "W8A16": _row(8, 128),
    "W4A16_MIXED": _row(4, 128, recipe="W4A16_MIXED"),
    "BF16": _row(16, 128, "fp"),
    "INT8": _row(8, -1, **_dynamic(8, -1, "int")),
    "INT8_W8A8": _row(8, -1, **_dynamic(8, -1, "int")),
    "INT4": _row(4, -1, **_dynamic(4, -1, "int")),
    # MXINT4 and NVFP4_E5M3 are known names of formats that are not computed yet; `weight_format` says so.
    "MXFP4": _row(4, 32, "mx_fp", **_dynamic(4, 32, "mx_fp")),
    "MXFP4_RCEIL": _row(4, 32, "mx_fp", **_dynamic(4, 32, "mx_fp_rceil")),
    "MXFP6": _row(6, 32, "mx_fp", **_dynamic(6, 32, "mx_fp")),
    "MXFP8": _row(8, 32, "mx_fp", **_dynamic(8, 32, "mx_fp")),
    "MXFP8_RCEIL": _row(8, 32, "mx_fp", **_dynamic(8, 32, "mx_fp_rceil")),
    "MXINT4": _row(4, 32, "mx_int", **_dynamic(4, 32, "mx_int")),
    "NVFP4": _row(4, 16, "nv_fp", **_dynamic(4, 16, "nv_fp4_with_static_gs")),
    "NVFP4_E5M3": _row(4, 16, "nvfp4_v2", **_dynamic(4, 16, "nvfp4_v2")),
    "FPW8A16": _row(8, 0, "fp"),
    "FP8_STATIC": _row(8, -1, "fp", **_dynamic(8, 0, "fp") | {"act_dynamic": False}),
    # Blocks of 128 x 128 weights.
    "FP8_BLOCK": _row(8, 128, "fp_block", **_dynamic(8, 128, "fp")),
    "GGUF:Q4_0": _row(4, 32, "int_gguf"),
    "GGUF:Q4_1": _row(4, 32, **_Q4_1),
    "GGUF:Q5_0": _row(5, 32, "int_gguf"),
    "GGUF:Q5_1": _row(5, 32, **_Q4_1),
    "GGUF:Q8_0": _row(8, 32, "int_gguf"),
    "GGUF:Q2_K": _Q2_K,
    "GGUF:Q2_K_S": _Q2_K,
    "GGUF:Q2_K_MIXED": _Q2_K,
    "GGUF:Q3_K_S": _Q3_K,
    "GGUF:Q3_K_M": _Q3_K,
    "GGUF:Q3_K_L": _Q3_K,
    "GGUF:Q4_K_S": _row(4, 32, **_K_ASYM),
    "GGUF:Q4_K_M": _row(4, 32, **_K_ASYM),
    "GGUF:Q5_K_S": _row(5, 32, **_K_ASYM),
    "GGUF:Q5_K_M": _row(5, 32, **_K_ASYM),
    "GGUF:MXFP4": _row(4, 32, "mx_fp"),
    "GGUF:MXFP4_MOE": _row(4, 32, "mx_fp"),
    "GGUF:NVFP4": _row(4, 16, "nv_fp_gguf"),
    "GGUF:Q6_K": _row(6, 16, "int_sym_dq", super_bits=8, super_group_size=16),
}
"""Preset name -> scheme. A new whole-number format is one row here."""


def integer_presets() -> tuple[str, ...]:
    """Names of the presets that can be computed today, in table order."""
    return tuple(n for n, s in PRESET_SCHEMES.items() if s.quantized and not isinstance(_formats(s), Refusal))


def parse_scheme(
    value: object,
    overrides: Mapping[str, Any] | None = None,
    base: QuantizationScheme | None = None,
) -> QuantizationScheme:
    """Scheme of what a user wrote.

    Args:
        value: preset name in any case, dictionary of scheme fields, or a scheme.
        overrides: single fields that replace those of `value`; None values mean not given. GGUF presets keep
            their own fields.
        base: where missing fields of a dictionary come from; the field defaults when None.

    Raises:
        ConfigError: an unknown preset or field, or a value of the wrong type or outside of its range.
    """
    start = QuantizationScheme() if base is None else replace(base, recipe=None)
    if isinstance(value, str):
        name = value.strip().upper()
        if name not in PRESET_SCHEMES:
            raise ConfigError(
                f'unknown scheme "{value}"; {nearest(value, PRESET_SCHEMES)} ("auto-round list scheme")'
            )
        if name.startswith("GGUF:"):
            return PRESET_SCHEMES[name]
        scheme = replace(PRESET_SCHEMES[name], scale_dtype=start.scale_dtype)
    elif isinstance(value, QuantizationScheme):
        scheme = value
    elif isinstance(value, Mapping):
        scheme = _merge(start, value)
    else:
        example = f'{{"bits": {value}}}' if type(value) is int else '{"bits": 4}'
        raise ConfigError(
            f"a scheme is a preset name, a dictionary of fields such as {example}, or a QuantizationScheme, "
            f"got {value!r}"
        )
    return _merge(scheme, overrides or {})
