"""The table of number types: what `data_type` and `act_data_type` of a scheme mean, one row each.

A row says how formats are made from a scheme's fields, and which words stand for the type in the
configurations of folders; `type_columns.py` explains its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from auto_round.errors import Refusal
from auto_round.facts.compressed import BYTES, WORDS
from auto_round.schemes.float_types import FLOAT_TYPES, refuse_fixed_groups
from auto_round.schemes.type_columns import CompressedWords, InputFields, NumberType

if TYPE_CHECKING:
    from auto_round.numerics.activation_float import InputFormat
    from auto_round.numerics.format import Format
    from auto_round.schemes.scheme import QuantizationScheme

INT = "int"
"""The type of whole numbers with a step for each group."""

WHOLE = (2, 3, 4, 5, 6, 7, 8)
"""Widths of whole numbers."""


def weights_of(scheme: QuantizationScheme) -> Format | Refusal:
    """Numeric format of the weights of a scheme that quantizes them, or why it is not there yet."""
    row = NUMBER_TYPES.get(scheme.data_type)
    found = None
    if row is not None and scheme.bits in row.bits:
        if row.group_sizes and scheme.group_size not in row.group_sizes:
            sizes = " or ".join(map(str, row.group_sizes))
            reason = f'data_type "{scheme.data_type}" has groups of {sizes}, not of {scheme.group_size}'
            return Refusal("weights", reason, f"use group_size {sizes}")
        found = row.weights(scheme)
    if found is None:
        what = f'data_type "{scheme.data_type}" with {scheme.bits} bits'
        return Refusal("weights", f"{what} is not there yet, {_there()} are")
    return found


def inputs_of(fields: InputFields) -> InputFormat | Refusal:
    """What the input of a layer is rounded to, or why that is not there yet."""
    row = NUMBER_TYPES.get(fields.data_type)
    if row is None or row.inputs is None or fields.bits not in row.input_bits:
        reason = f'act_data_type "{fields.data_type}" with {fields.bits} bits is not there yet'
        return Refusal("activations", reason, f"{_there()} are")
    return row.inputs(fields)


def has_short_groups(data_type: str) -> bool:
    """Whether the last groups of a row of weights may be short."""
    return data_type in NUMBER_TYPES and NUMBER_TYPES[data_type].short_groups


def stored_word(data_type: str) -> str:
    """`data_type` in the configuration of an auto-round folder; the type's own name where none holds it."""
    return NUMBER_TYPES[data_type].stored if data_type in NUMBER_TYPES else data_type


def steps_of(data_type: str) -> str:
    """Dtype of steps where the configuration of an auto-round folder names none."""
    return NUMBER_TYPES[data_type].steps


def stored_type(word: str) -> str | None:
    """Number type that `data_type` of an auto-round folder means; None where no folder holds it.

    Some tools add to the word (`int_sym`), so only its beginning is compared; the longest match wins.
    """
    rows = ((row.stored, name) for name, row in NUMBER_TYPES.items() if row.stored)
    found = [(len(stored), name) for stored, name in rows if word.startswith(stored)]
    return max(found)[1] if found else None


def spellings() -> dict[str, dict[str, Any]]:
    """Every spelling of `data_type` and the fields that it decides; those of bits win over `bits`."""
    return {
        spelling: {"data_type": name, **others}
        for name, row in NUMBER_TYPES.items()
        for spelling, others in row.spellings.items()
    }


def _there() -> str:
    return " and ".join(row.called for row in NUMBER_TYPES.values() if row.called)


def _whole_weights(scheme: QuantizationScheme) -> Format | Refusal:
    from auto_round.numerics.presets import SCALE_DTYPES, int_format

    if scheme.super_bits is not None or scheme.super_group_size is not None:
        return Refusal("weights", "two-level steps (super_bits, super_group_size) are not there yet")
    return int_format(
        scheme.bits, scheme.group_size, sym=scheme.sym, scale_dtype=SCALE_DTYPES[scheme.scale_dtype]
    )


def _whole_inputs(fields: InputFields) -> InputFormat | Refusal:
    from auto_round.numerics.activation import TokenInt
    from auto_round.numerics.activation_int import tensor_int

    if not fields.dynamic:
        return refuse_fixed_groups(fields) or tensor_int(fields.bits, sym=fields.sym)
    if fields.group_size != -1:
        size = fields.group_size
        reason = f"groups of {size} are not there yet" if size else "one step a tensor is not there yet"
        return Refusal("activations", reason, "use act_group_size -1 (one step a token)")
    return TokenInt(fields.bits, fields.sym)


def _whole_bytes(scheme: QuantizationScheme) -> str:
    """`format` of compressed-tensors: one byte a code for products of 8 by 8 bits, else packed words.

    vLLM and SGLang have such products for one step a row; beside any other weights vLLM takes quantized
    activations from packed words only.
    Source: `_get_scheme_from_parts` in vLLM's and SGLang's `compressed_tensors.py`.
    """
    eight_by_eight = (scheme.bits, scheme.group_size, scheme.act_bits) == (8, -1, 8)
    return BYTES if eight_by_eight else WORDS


def _blocks(*names: str) -> Callable[[QuantizationScheme], Format | None]:
    """Builder of a type whose formats are blocks of GGUF files, told apart by their bits."""

    def build(scheme: QuantizationScheme) -> Format | None:
        from auto_round.numerics.presets import GGUF_FORMATS

        formats = (GGUF_FORMATS[name] for name in names)
        return next((fmt for fmt in formats if _is_block(fmt, scheme)), None)

    return build


def _is_block(fmt: Format, scheme: QuantizationScheme) -> bool:
    """Whether all that a scheme says is what a block type holds."""
    from auto_round.numerics.scale_two_level import SharedAffine, SharedSigned

    levels: tuple[int | None, int | None] = (None, None)
    if isinstance(fmt.rule, SharedSigned | SharedAffine):
        levels = (fmt.rule.steps.bits, fmt.rule.steps.per)
    said = (scheme.bits, scheme.group_size, scheme.sym, (scheme.super_bits, scheme.super_group_size))
    held = (fmt.grid.bits, fmt.group.size, fmt.grid.lo < 0, levels)
    plain = not scheme.act_quantized and scheme.recipe is None and scheme.scale_dtype == "float16"
    return plain and said == held


NUMBER_TYPES: dict[str, NumberType] = {
    INT: NumberType(
        called="whole numbers (int) of 2 to 8 bits",
        spellings={
            "int": {},
            "int_sym": {"sym": True},
            "int_asym": {"sym": False},
            **{f"int{bits}": {"bits": bits} for bits in WHOLE},
        },
        bits=WHOLE,
        weights=_whole_weights,
        input_bits=WHOLE,
        inputs=_whole_inputs,
        runs_inputs=True,
        stored="int",
        compressed=CompressedWords(type="int", format=_whole_bytes),
    ),
    "int_gguf": NumberType(
        spellings={"int_gguf": {}}, bits=(4, 5, 8), weights=_blocks("q4_0", "q5_0", "q8_0"), blocks=True
    ),
    "int_asym_float_zp": NumberType(
        spellings={"int_asym_float_zp": {"sym": False}},
        bits=(4, 5),
        weights=_blocks("q4_1", "q5_1"),
        blocks=True,
    ),
    "int_sym_dq": NumberType(
        spellings={"int_sym_dq": {"sym": True}}, bits=(3, 6), weights=_blocks("q3_k", "q6_k"), blocks=True
    ),
    "int_asym_dq": NumberType(
        spellings={"int_asym_dq": {"sym": False}},
        bits=(2, 4, 5),
        weights=_blocks("q2_k", "q4_k", "q5_k"),
        blocks=True,
    ),
    **FLOAT_TYPES,
}
"""Number types by `data_type`."""
