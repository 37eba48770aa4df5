"""The table of numeric formats: one row each; everything else is derived."""

from __future__ import annotations

import torch

from auto_round.errors import ConfigError
from auto_round.facts.tensor import dtype_name
from auto_round.numerics.format import Format
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.group import Group
from auto_round.numerics.multiples import Multiples
from auto_round.numerics.presets_float import mx_format, nv_format
from auto_round.numerics.rule import ScaleRule
from auto_round.numerics.scale_affine import Affine
from auto_round.numerics.scale_integer import MinMax, SignedMax
from auto_round.numerics.scale_two_level import SharedAffine, SharedSigned

INT_BITS = (2, 3, 4, 5, 6, 7, 8)
"""Widths of whole-number codes."""

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Dtypes in which a step may be stored."""


def int_format(bits: int, group_size: int, *, sym: bool, scale_dtype: torch.dtype = torch.float16) -> Format:
    """Whole-number format of `bits` bits.

    Args:
        bits: 2 to 8.
        group_size: weights in a group, -1 one group a row, 0 one a tensor.
        sym: signed full range without zero point, or unsigned with one.
        scale_dtype: stored dtype of the step.

    Raises:
        ConfigError: a width or group size outside of these.
    """
    if bits not in INT_BITS:
        raise ConfigError(f"bits must be one of {INT_BITS}, got {bits}")
    name = f"int{bits}_g{group_size}_{'sym' if sym else 'asym'}"
    if scale_dtype is not torch.float16:
        name += "_" + dtype_name(scale_dtype)
    if sym:
        return Format(name, IntGrid(bits, -(1 << (bits - 1))), Group(group_size), SignedMax(scale_dtype))
    return Format(name, IntGrid(bits, 0), Group(group_size), MinMax(scale_dtype, bits))


def _gguf(name: str, bits: int, group_size: int, rule: ScaleRule) -> Format:
    lowest = -(1 << (bits - 1)) if isinstance(rule, (SignedMax, SharedSigned)) else 0
    return Format(name, IntGrid(bits, lowest), Group(group_size), rule)


def _k_affine(bits: int, per: int) -> SharedAffine:
    return SharedAffine(Multiples(bits, per, 1), Multiples(bits, per, 0))


GGUF_FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _gguf("q4_0", 4, 32, SignedMax()),
        _gguf("q4_1", 4, 32, Affine()),
        _gguf("q5_0", 5, 32, SignedMax()),
        _gguf("q5_1", 5, 32, Affine()),
        _gguf("q8_0", 8, 32, SignedMax()),
        _gguf("q2_k", 2, 16, _k_affine(4, 16)),
        _gguf("q3_k", 3, 16, SharedSigned(Multiples(6, 16, -32))),
        _gguf("q4_k", 4, 32, _k_affine(6, 8)),
        _gguf("q5_k", 5, 32, _k_affine(6, 8)),
        _gguf("q6_k", 6, 16, SharedSigned(Multiples(8, 16, -128))),
        mx_format("fp4"),
    )
} | {"nvfp4": nv_format(times=True)}
"""Block types of GGUF files by their name in llama.cpp, in lower case. Source: `ggml-common.h`.

q8_0 uses all 256 codes; llama.cpp's own quantizer leaves out -128, its kernels accept it."""

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(int_format(b, g, sym=s) for b in INT_BITS for g in (32, 64, 128, -1, 0) for s in (True, False)),
        *(
            int_format(4, 32, sym=s, scale_dtype=d)
            for s in (True, False)
            for d in (torch.bfloat16, torch.float32)
        ),
        *(fmt for fmt in GGUF_FORMATS.values() if isinstance(fmt.grid, IntGrid)),
    )
}
"""Formats of whole numbers by name: what the conformance kits run over, beside `FLOAT_FORMATS`."""
