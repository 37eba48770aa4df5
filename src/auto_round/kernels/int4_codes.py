"""Whole-number formats of 2 to 4 bits as offset-binary 4-bit codes, without any rounding.

PyTorch's packed matrices hold `w = (code - 8) * step + fold` with codes 0 ... 15. A format of fewer bits has
room to move its zero point to 8 by adding a whole number to the codes of each group, so that the fold
vanishes; only asymmetric 4-bit weights need it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.numerics.format import Format
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.scale import MinMax, Scale, SignedMax

MIDDLE = 8
"""Code that stands for zero in offset-binary 4-bit codes."""


def fits(fmt: Format) -> bool:
    """Whether a format's codes can be written as 4-bit codes."""
    return isinstance(fmt.grid, IntGrid) and fmt.grid.bits <= 4 and isinstance(fmt.rule, (SignedMax, MinMax))


def code_shift(scale: Scale, fmt: Format) -> Tensor | int:
    """What is added to the codes of each group: int16 `[rows, n_groups]`, or one number for all."""
    if scale.zero is None:
        return MIDDLE + int(fmt.grid.lo)
    if fmt.grid.bits == 4:
        return 0
    return MIDDLE - scale.zero.to(torch.int16)


def fold_units(scale: Scale, fmt: Format) -> Tensor | None:
    """Fold in units of the step, float32 `[rows, n_groups]`; None where it is 0 in every group."""
    if scale.zero is None or fmt.grid.bits < 4:
        return None
    return MIDDLE - scale.zero


def to_int4(codes: Tensor, scale: Scale, fmt: Format) -> Tensor:
    """Codes of `fmt`, `[out, in]` uint8, as 4-bit codes, int32, same shape."""
    return _shifted(codes, code_shift(scale, fmt), fmt).to(torch.int32)


def from_int4(codes: Tensor, scale: Scale, fmt: Format) -> Tensor:
    """Inverse of `to_int4`; uint8."""
    shift = code_shift(scale, fmt)
    return _shifted(codes, -shift, fmt).to(torch.uint8)


def _shifted(codes: Tensor, shift: Tensor | int, fmt: Format) -> Tensor:
    if isinstance(shift, int):
        return codes.to(torch.int16) + shift
    grouped = fmt.group.split(codes.to(torch.int16)) + shift.unsqueeze(-1)
    return fmt.group.join(grouped, codes.shape)
