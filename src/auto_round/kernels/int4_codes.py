"""Whole-number formats of 2 to 8 bits as one or two planes of offset-binary 4-bit codes, unrounded.

PyTorch's packed matrices hold `w = (code - 8) * step + fold` with codes 0 ... 15. A format of fewer bits
has room to move its zero point to the middle by adding a whole number to the codes of each group, so that
the fold vanishes; only asymmetric 4-bit weights need it. Wider codes become codes of 8 bits in the same
way, and those two planes: `code - 128 = 16 (high - 8) + (low - 8) + 8`, so that the inputs are multiplied
by two 4-bit matrices whose steps differ by a factor of 16 and whose results are added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.layouts.integers import has_steps
from auto_round.numerics.format import Format
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.scale import Scale
from auto_round.numerics.scale_integer import MinMax

PLANE_BITS = 4
"""Width of the codes of one plane."""

GROUPS = (256, 128, 64, 32)
"""Widths of the groups that PyTorch's packed int4 matrices take; wider groups repeat their step."""

MIDDLE = 1 << (PLANE_BITS - 1)
"""Code of a plane that stands for zero."""


def is_whole(fmt: Format) -> bool:
    """Whether a format has whole numbers with one step a group, which lies in one row or is the matrix."""
    return isinstance(fmt.grid, IntGrid) and has_steps(fmt) and fmt.group.rows == 1


def packed_group(fmt: Format, n_in: int) -> int | None:
    """Widest of `GROUPS` that tiles the groups and the rows of a weight; None when there is none."""
    width = fmt.group.width(n_in)
    return next((g for g in GROUPS if width % g == 0 and n_in % g == 0), None)


@dataclass(frozen=True, slots=True)
class CodePlanes:
    """How codes of one weight become planes.

    Attributes:
        fmt: format of the weight.
        n_in: inputs.
        width: weights that share a step in the planes; divides the format's groups and `n_in`.
    """

    fmt: Format
    n_in: int
    width: int

    @classmethod
    def of(cls, fmt: Format, n_in: int) -> CodePlanes:
        """The planes with the widest groups that packed int4 matrices take.

        Raises:
            ValueError: they take none that tiles the weight's.
        """
        width = packed_group(fmt, n_in)
        if width is None:
            raise ValueError(f"packed int4 matrices refuse groups of {fmt.name} in rows of {n_in}")
        return cls(fmt, n_in, width)

    @property
    def count(self) -> int:
        """Planes: 1 for codes of up to 4 bits, 2 for wider ones."""
        return -(-self.fmt.grid.bits // PLANE_BITS)

    @property
    def middle(self) -> int:
        """Joined code that stands for zero."""
        return 1 << (self.count * PLANE_BITS - 1)

    @property
    def keeps_zero(self) -> bool:
        """Whether the codes fill the planes, so that a zero point cannot be moved."""
        return isinstance(self.fmt.rule, MinMax) and self.fmt.grid.bits == self.count * PLANE_BITS

    def split(self, codes: Tensor, scale: Scale, rows: slice) -> Tensor:
        """Codes `[rows, in]` uint8 of the format as `[rows, count * in]` of the planes, high plane first."""
        joined = self._shifted(codes, self._shift(scale, codes.shape[0], rows))
        if self.count == 1:
            return joined
        return torch.cat([joined >> PLANE_BITS, joined & ((1 << PLANE_BITS) - 1)], dim=1)

    def join(self, planes: Tensor, scale: Scale) -> Tensor:
        """Inverse of `split` for all rows."""
        joined = planes
        if self.count > 1:
            high, low = planes[:, : self.n_in], planes[:, self.n_in :]
            joined = (high << PLANE_BITS).bitwise_or_(low)
        shift = self._shift(scale, planes.shape[0], slice(None))
        return self._shifted(joined, -shift)

    def scale_zero(self, scale: Scale, n_out: int) -> Tensor:
        """Step and fold of each group of the planes, `[count * in / width, out, 2]` bfloat16.

        Folds are multiples of the rounded step, so that a weight near zero keeps a small error.
        """
        step = self.spread(scale.step, n_out).to(torch.bfloat16)
        fold = torch.zeros_like(step)
        if self.keeps_zero and scale.zero is not None:
            fold = ((self.middle - self.spread(scale.zero, n_out)) * step.float()).to(torch.bfloat16)
        if self.count > 1:  # both factors are powers of two: exact
            fold = torch.cat([fold, step * MIDDLE], dim=1)
            step = torch.cat([step * (1 << PLANE_BITS), step], dim=1)
        return torch.stack([step, fold], dim=-1).transpose(0, 1).contiguous()

    def spread(self, part: Tensor, n_out: int) -> Tensor:
        """Values of the format's groups for those of the planes, `[out, in / width]`."""
        repeats = self.fmt.group.width(self.n_in) // self.width
        part = part.expand(n_out, -1)
        return part if repeats == 1 else part.repeat_interleave(repeats, dim=1)[:, : self.n_in // self.width]

    def _shift(self, scale: Scale, n_out: int, rows: slice) -> Tensor | int:
        """What is added to the codes of each group: one number, or int16 `[rows, in / width]`."""
        if scale.zero is None:
            return self.middle + int(self.fmt.grid.lo)
        if self.keeps_zero:
            return 0
        zero = scale.zero[self.fmt.group.scale_rows(rows)]
        return (self.middle - self.spread(zero, n_out)).to(torch.int16)

    def _shifted(self, codes: Tensor, shift: Tensor | int) -> Tensor:
        if isinstance(shift, int):
            return codes + shift if shift else codes
        wrapped = shift.bitwise_and(255).to(torch.uint8)  # sums of bytes wrap, so that -1 is 255
        return (codes.view(len(codes), -1, self.width) + wrapped.unsqueeze(-1)).view_as(codes)
