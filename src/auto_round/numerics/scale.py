"""The scale of each group, what it follows from (ranges and tunable knobs), and how its parts are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auto_round.errors import Refusal, UnsupportedError
from auto_round.numerics.ste import cast_ste, clamp_ste


@dataclass(frozen=True, slots=True)
class Stats:
    """Range of each group: all that a scale rule knows of the weights.

    Attributes:
        lo: `min(group, 0)`, `[..., rows, n_groups]` float32.
        hi: `max(group, 0)`, same shape.
    """

    lo: Tensor
    hi: Tensor

    def __getitem__(self, index: int | slice) -> Stats:
        """Those of some rows, or of one matrix of several."""
        return Stats(self.lo[index], self.hi[index])


@dataclass(frozen=True, slots=True)
class Knobs:
    """Tunable multipliers of a group's range; 1 means the range as measured.

    Attributes:
        lo: multiplier of `Stats.lo`, `[..., rows, n_groups]` float32.
        hi: multiplier of `Stats.hi`, same shape.
    """

    lo: Tensor
    hi: Tensor


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of each group: `w = (n - zero) * step - floor` with `n` a number of the grid.

    Attributes:
        step: multiplier, `[..., rows, n_groups]` float32, exactly what `parts` decodes to; may be negative.
        zero: zero point in code units, whole numbers in float32, same shape; None where it is always 0.
        parts: what goes on disk, for example `{"step": float16, "zero": uint8}`.
        floor: what is subtracted in units of the weights, float32, same shape; None where it is always 0.
            A rule has a zero point or a floor, not both.
    """

    step: Tensor
    zero: Tensor | None
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    floor: Tensor | None = None

    def __getitem__(self, rows: slice | int) -> Scale:
        """Some rows of it, or one matrix of a stack, without what goes on disk."""
        zero = None if self.zero is None else self.zero[rows]
        return Scale(self.step[rows], zero, floor=None if self.floor is None else self.floor[rows])


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One stored part of a weight's scales: how each of its numbers is stored, and how many groups share it.

    Attributes:
        dtype: of the tensor in `Scale.parts`.
        bits: what one of its numbers takes on disk, bits; a narrower number than the dtype holds starts at 0,
            or for signed dtypes at `-2**(bits-1)`.
        span: groups that share one number, rows of them and neighbours in a row; 0 for all of them. `(1, 1)`
            each group has its own, `(1, 8)` blocks of 8, `(1, 0)` a row, `(0, 0)` the whole matrix.
    """

    dtype: torch.dtype
    bits: int
    span: tuple[int, int] = (1, 1)

    def shape(self, groups: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part for scales of shape `groups` `[..., rows, n_groups]`."""
        ends = (-(-n // each) if each else 1 for n, each in zip(groups[-2:], self.span, strict=True))
        return (*groups[:-2], *ends)

    def rows(self, groups: slice) -> slice:
        """Rows of the part that hold the numbers of some rows of groups.

        Raises:
            UnsupportedError: they begin among groups that share a number.
        """
        each = self.span[0]
        if groups == slice(None) or each == 1:
            return groups
        if each == 0:
            return slice(None)
        if groups.start % each or groups.step not in (None, 1):
            raise UnsupportedError(
                f"rows of groups {groups.start} to {groups.stop} cannot be taken from a weight",
                [Refusal("scales", f"{each} rows of groups share a number, and these lie among them")],
            )
        return slice(groups.start // each, -(-groups.stop // each))


@dataclass(frozen=True, slots=True)
class Moments:
    """Least-squares sums over each group, `[rows, n_groups]` float32.

    `i` is the importance of a weight `w`, and `n` the number that it is rounded to, less the zero point. From
    these sums follow the best step and floor while `n` stays: `sum(i * (n * step - floor - w)**2)` is least.

    Attributes:
        one: `sum(i)`.
        n: `sum(i * n)`.
        w: `sum(i * w)`.
        nn: `sum(i * n * n)`.
        nw: `sum(i * n * w)`.
    """

    one: Tensor
    n: Tensor
    w: Tensor
    nn: Tensor
    nw: Tensor


def legal_step(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `step` to `dtype`, keep it finite, and replace 0 by the smallest normal number of `dtype`.

    A group of zeros (or of weights below the dtype's range) gets codes of 0 from any step; a normal number
    is used since kernels may flush subnormals.
    """
    info = torch.finfo(dtype)
    stored = cast_ste(clamp_ste(step, -info.max, info.max), dtype)
    return torch.where(stored == 0, info.smallest_normal, stored)


MAX_KNOB = 16.0
"""Range multipliers stay inside 0 ... 16, in the search and in tuning."""
