"""Floating number types: FP8, the microscaling types (MX) and NVFP4; rows of the table of number types."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from auto_round.errors import Refusal
from auto_round.facts.compressed import FP8, MXFP4, MXFP6, MXFP8, NVFP4
from auto_round.schemes.type_columns import CompressedWords, InputFields, NumberType

if TYPE_CHECKING:
    from auto_round.numerics.activation_float import InputFormat
    from auto_round.numerics.format import Format
    from auto_round.schemes.scheme import QuantizationScheme

_MX_SIZES = (32,)
_NV_SIZES = (16,)
NV_STATIC = "nv_fp4_with_static_gs"
"""Name of NVFP4 for inputs, as auto-round 0.16 spells it."""
_E8M0 = "torch.uint8"
_E4M3 = "torch.float8_e4m3fn"


_WIDE = "float32"
"""Dtype that holds steps of any other: auto-round 0.16 writes them in that of the model, and says nothing."""

_KEPT = ("float", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32")
"""Names of the types that models come in: a layer with 16 bits is kept."""


def _asymmetric(what: str, *, sym: bool) -> Refusal | None:
    return None if sym else Refusal(what, "floating numbers have no zero points", "leave out asym")


def _fp8_weights(scheme: QuantizationScheme, *, blocks: bool = False) -> Format | Refusal:
    from auto_round.numerics.group import Group
    from auto_round.numerics.presets import SCALE_DTYPES
    from auto_round.numerics.presets_float import FP8_BLOCK, fp8_format

    group = FP8_BLOCK if blocks else Group(scheme.group_size)
    return _asymmetric("weights", sym=scheme.sym) or fp8_format(
        group, scale_dtype=SCALE_DTYPES[scheme.scale_dtype]
    )


def refuse_fixed_groups(fields: InputFields) -> Refusal | None:
    """Why calibration cannot fix a step for each token or group; None for one for the whole tensor."""
    if fields.group_size == 0:
        return None
    return Refusal(
        "activations",
        "a step that calibration fixes is one for the whole tensor, tokens and groups are not known then",
        "act_group_size 0, or leave out disable_act_dynamic",
    )


def _fp8_inputs(fields: InputFields) -> InputFormat | Refusal:
    from auto_round.numerics.activation_float import CalibratedScale, MeasuredScales
    from auto_round.numerics.group import Group
    from auto_round.numerics.presets_float import fp8_format

    if refusal := _asymmetric("activations", sym=fields.sym):
        return refusal
    found = fp8_format(Group(fields.group_size))
    if fields.dynamic:
        return MeasuredScales(found)
    return refuse_fixed_groups(fields) or CalibratedScale(found)


def _mx_weights(element: str, scheme: QuantizationScheme) -> Format | Refusal:
    from auto_round.numerics.presets_float import mx_format

    return _asymmetric("weights", sym=scheme.sym) or mx_format(f"{element}{scheme.bits}")


def _mx_inputs(element: str, fields: InputFields, *, ceil: bool = False) -> InputFormat | Refusal:
    from auto_round.numerics.activation_float import MeasuredScales
    from auto_round.numerics.presets_float import mx_format

    if fields.group_size not in _MX_SIZES:
        return Refusal("activations", f"MX has groups of 32, not of {fields.group_size}", "act_group_size 32")
    if not fields.dynamic:
        return Refusal("activations", "MX scales are always measured", "leave out disable_act_dynamic")
    found = mx_format(f"{element}{fields.bits}", ceil=ceil)
    return _asymmetric("activations", sym=fields.sym) or MeasuredScales(found)


def _nv_weights(scheme: QuantizationScheme, *, e5m3: bool = False, times: bool = False) -> Format | Refusal:
    from auto_round.numerics.grid_float import E4M3, E5M3
    from auto_round.numerics.presets_float import nv_format

    return _asymmetric("weights", sym=scheme.sym) or nv_format(E5M3 if e5m3 else E4M3, times=times)


def _other_groups(fields: InputFields) -> Refusal | None:
    """Why inputs have no groups like these in NVFP4; None where they are its own."""
    if fields.group_size in _NV_SIZES:
        return None
    return Refusal("activations", f"NVFP4 has groups of 16, not of {fields.group_size}", "act_group_size 16")


def _nv_inputs(fields: InputFields, *, measured: bool = False) -> InputFormat | Refusal:
    """Groups have measured numbers, over one for the whole tensor that calibration fixes.

    Args:
        fields: what the scheme says.
        measured: the type's name does not say that the number is fixed, so `act_dynamic` has to.
    """
    from auto_round.numerics.activation_float import CalibratedScale
    from auto_round.numerics.presets_float import nv_format

    if refusal := _other_groups(fields):
        return refusal
    if measured and fields.dynamic:
        reason = "the number over all groups of NVFP4 inputs is fixed at calibration, not measured"
        return Refusal("activations", reason, f"act_data_type {NV_STATIC}")
    return _asymmetric("activations", sym=fields.sym) or CalibratedScale(nv_format(measured=True))


def _nv_e5m3_inputs(fields: InputFields) -> InputFormat | Refusal:
    from auto_round.numerics.activation_float import MeasuredScales
    from auto_round.numerics.grid_float import E5M3
    from auto_round.numerics.presets_float import nv_format

    if refusal := _other_groups(fields):
        return refusal
    if not fields.dynamic:
        return Refusal("activations", "E5M3 scales are always measured", "leave out disable_act_dynamic")
    return _asymmetric("activations", sym=fields.sym) or MeasuredScales(nv_format(E5M3, measured=True))


_MX_LAYOUTS = {4: MXFP4, 6: MXFP6, 8: MXFP8}


def _always(name: str) -> Callable[[QuantizationScheme], str]:
    return lambda _: name


FLOAT_TYPES: dict[str, NumberType] = {
    "fp": NumberType(
        called="FP8 (fp)",
        spellings={"fp": {}, "fp8": {"bits": 8}, **{name: {"bits": 16} for name in _KEPT}},
        bits=(8,),
        weights=_fp8_weights,
        input_bits=(8,),
        inputs=_fp8_inputs,
        runs_inputs=True,
        stored="fp",
        steps=_WIDE,
        compressed=CompressedWords(type="float", format=_always(FP8)),
    ),
    "fp_block": NumberType(
        called="FP8 in blocks of 128 x 128 (fp_block)",
        spellings={"fp_block": {"bits": 8}},
        bits=(8,),
        group_sizes=(128,),
        short_groups=True,
        weights=partial(_fp8_weights, blocks=True),
        stored="fp_block",
        steps=_WIDE,
        compressed=CompressedWords(type="float", format=_always(FP8), strategy="block", block=(128, 128)),
    ),
    "mx_fp": NumberType(
        called="MXFP4, MXFP6 and MXFP8 (mx_fp)",
        spellings={"mx_fp": {}, **{f"mx_fp{bits}": {"bits": bits} for bits in _MX_LAYOUTS}},
        bits=tuple(_MX_LAYOUTS),
        group_sizes=_MX_SIZES,
        weights=partial(_mx_weights, "fp"),
        input_bits=tuple(_MX_LAYOUTS),
        inputs=partial(_mx_inputs, "fp"),
        runs_inputs=True,
        stored="mx_fp",
        steps="",
        compressed=CompressedWords(
            type="float", format=lambda scheme: _MX_LAYOUTS[scheme.bits], scale_dtype=_E8M0
        ),
    ),
    "mx_fp_rceil": NumberType(
        spellings={"mx_fp_rceil": {}},
        bits=(),
        weights=lambda _: None,
        input_bits=tuple(_MX_LAYOUTS),
        inputs=partial(_mx_inputs, "fp", ceil=True),
        runs_inputs=True,
        stored="mx_fp_rceil",
        steps="",
        compressed=CompressedWords(type="float", format=_always(""), scale_dtype=_E8M0),
    ),
    "mx_int": NumberType(
        called="MXINT4 and MXINT8 (mx_int)",
        spellings={"mx_int": {}, "mx_int4": {"bits": 4}, "mx_int8": {"bits": 8}},
        bits=(4, 8),
        group_sizes=_MX_SIZES,
        weights=partial(_mx_weights, "int"),
        input_bits=(4, 8),
        inputs=partial(_mx_inputs, "int"),
    ),
    "nv_fp": NumberType(
        called="NVFP4 (nv_fp)",
        spellings={"nv_fp": {}, "nv_fp4": {"bits": 4}},
        bits=(4,),
        group_sizes=_NV_SIZES,
        weights=_nv_weights,
        input_bits=(4,),
        inputs=partial(_nv_inputs, measured=True),
        runs_inputs=True,
        stored="nv_fp",
        steps=_WIDE,
        compressed=CompressedWords(
            type="float", format=_always(NVFP4), strategy="tensor_group", scale_dtype=_E4M3
        ),
    ),
    NV_STATIC: NumberType(
        spellings={NV_STATIC: {"bits": 4}},
        bits=(),
        weights=lambda _: None,
        input_bits=(4,),
        inputs=_nv_inputs,
        runs_inputs=True,
        stored=NV_STATIC,
        compressed=CompressedWords(
            type="float", format=_always(""), strategy="tensor_group", scale_dtype=_E4M3
        ),
    ),
    "nv_fp_gguf": NumberType(
        spellings={"nv_fp_gguf": {}},
        bits=(4,),
        group_sizes=_NV_SIZES,
        weights=partial(_nv_weights, times=True),
        blocks=True,
    ),
    "nvfp4_v2": NumberType(
        called="NVFP4 with E5M3 scales (nvfp4_v2)",
        spellings={"nvfp4_v2": {"bits": 4}},
        bits=(4,),
        group_sizes=_NV_SIZES,
        weights=partial(_nv_weights, e5m3=True),
        input_bits=(4,),
        inputs=_nv_e5m3_inputs,
    ),
}
"""Floating number types by `data_type`."""
