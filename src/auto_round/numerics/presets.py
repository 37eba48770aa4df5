"""The table of numeric formats: one row each; everything else is derived."""

from __future__ import annotations

import torch

from auto_round.errors import ConfigError
from auto_round.numerics.format import Format
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.group import Group
from auto_round.numerics.scale import MinMax, SignedMax

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
        name += "_" + str(scale_dtype).removeprefix("torch.")
    if sym:
        return Format(name, IntGrid(bits, -(1 << (bits - 1))), Group(group_size), SignedMax(scale_dtype))
    return Format(name, IntGrid(bits, 0), Group(group_size), MinMax(scale_dtype, bits))


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(int_format(b, g, sym=s) for b in INT_BITS for g in (32, 64, 128, -1, 0) for s in (True, False)),
        *(
            int_format(4, 32, sym=s, scale_dtype=d)
            for s in (True, False)
            for d in (torch.bfloat16, torch.float32)
        ),
    )
}
"""Formats by name: what the conformance kits run over."""
