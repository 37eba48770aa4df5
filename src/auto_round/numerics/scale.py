"""Scale rules: statistics of a group and tunable knobs -> the scale as it will be stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Protocol

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid
from auto_round.numerics.ste import cast_ste, round_ste


@dataclass(frozen=True, slots=True)
class Stats:
    """What a scale rule may know of each group.

    Attributes:
        lo: `min(group, 0)`, `[..., rows, n_groups]` float32.
        hi: `max(group, 0)`, same shape.
    """

    lo: Tensor
    hi: Tensor


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
    """The scale of each group: `w = (n - zero) * step` with `n` a number of the grid.

    Attributes:
        step: multiplier, `[..., rows, n_groups]` float32, exactly what `parts` decodes to; may be negative.
        zero: zero point in code units, whole numbers in float32, same shape; None where it is always 0.
        parts: what goes on disk, for example `{"step": float16, "zero": uint8}`.
    """

    step: Tensor
    zero: Tensor | None
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class ScaleRule(Protocol):
    """How a group's scale follows from its statistics and knobs."""

    @property
    def part_bits(self) -> int:
        """Bits that one group's scale takes on disk."""
        ...

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """Scale of each group, differentiable in the knobs; `parts` is filled only outside of autograd."""
        ...

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Scale of stored parts; `read(fit(...).parts)` equals `fit(...)` bit for bit."""
        ...

    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """Knobs worth trying first in a search, about `points` sizes of the range."""
        ...

    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """Neighbours of `knobs` at about `radius`."""
        ...

    def refit(
        self, stats: Stats, grid: Grid, scale: Scale, w: Tensor, n: Tensor, weight: Tensor | None
    ) -> Knobs | None:
        """Knobs of the least-squares step for grid numbers `n` (zero point removed); None without one."""
        ...


def _legal(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `step` to `dtype`, keep it finite, and replace 0 by the smallest normal number of `dtype`.

    A group of zeros (or of weights below the dtype's range) gets codes of 0 from any step; a normal number
    is used since kernels may flush subnormals.
    """
    info = torch.finfo(dtype)
    stored = cast_ste(step.clamp(-info.max, info.max), dtype)
    return torch.where(stored == 0, torch.full_like(stored, info.smallest_normal), stored)


MAX_KNOB = 16.0
"""Range multipliers stay inside 0 ... 16, in the search and in tuning."""

_FLIPPED_BITS = 3
"""Up to this width the smaller extreme may get the extra level. At 4 bits that lowers the error of the
weights but clips the larger extreme, and the model's KL grows by 0.6 % (docs/LOG.md)."""


@dataclass(frozen=True, slots=True)
class SignedMax:
    """Symmetric, full range: the extreme of larger magnitude is mapped to the grid's lowest number.

    With `Q = 2**(bits-1)` the grid is `-Q ... Q-1`; only `-Q` has the extra level, so the step is negative
    when the larger extreme is positive. Source: `spec int_sym` of SignRound implementations since 0.3.1 and
    llama.cpp's Q4_0 (`ggml-quants.c: quantize_row_q4_0_ref`).

    Attributes:
        dtype: stored dtype of the step.
    """

    dtype: torch.dtype = torch.float16

    @property
    def part_bits(self) -> int:
        """Bits of the stored step."""
        return torch.finfo(self.dtype).bits

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """`step = cast(+-max(|lo|, hi) / Q)`, positive when the negative side is larger."""
        lo, hi = -stats.lo, stats.hi
        if knobs is not None:
            lo, hi = lo * knobs.lo, hi * knobs.hi
        extreme = torch.where(hi < lo, lo, -hi)
        step = _legal(extreme / -grid.lo, self.dtype)
        if step.requires_grad:
            return Scale(step, None)
        return self.read({"step": step.to(self.dtype)})

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Step as stored."""
        return Scale(parts["step"].to(torch.float32), None, parts)

    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """Sizes of the range, with the larger and, at few bits, the smaller extreme at the lowest number."""
        size = torch.maximum(-stats.lo, stats.hi)
        for m in torch.linspace(0.45, 1.15, points).tolist():
            yield _signed(stats, size * m, -stats.lo > stats.hi)
            if grid.bits <= _FLIPPED_BITS:
                yield _signed(stats, size * m, -stats.lo <= stats.hi)

    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """A little wider, a little narrower."""
        for factor in (1 - radius, 1 + radius):
            yield Knobs(knobs.lo * factor, knobs.hi * factor)

    def refit(
        self, stats: Stats, grid: Grid, scale: Scale, w: Tensor, n: Tensor, weight: Tensor | None
    ) -> Knobs | None:
        """Least-squares step `sum(i w n) / sum(i n n)`, keeping its sign."""
        weighted = n if weight is None else n * weight
        step = (weighted * w).sum(-1) / (weighted * n).sum(-1).clamp_min(1e-30)
        return _signed(stats, step.abs() * -grid.lo, scale.step > 0)


def _signed(stats: Stats, size: Tensor, negative: Tensor) -> Knobs:
    """Knobs under which the extreme of `SignedMax` is `-size` where `negative`, else `+size`.

    A side that is (nearly) empty cannot be stretched that far; its multiplier stops at 16.
    """
    lo = (size / (-stats.lo).clamp_min(1e-30)).clamp_max(MAX_KNOB)
    hi = (size / stats.hi.clamp_min(1e-30)).clamp_max(MAX_KNOB)
    nothing = torch.zeros_like(size)
    return Knobs(torch.where(negative, lo, nothing), torch.where(negative, nothing, hi))


_UNEVEN = (0.7, 0.85, 1.0)
"""Sizes of single ends tried by `MinMax.starts`: 1 to 2 % less weight error at 2 and 3 bits (docs/LOG.md)."""


@dataclass(frozen=True, slots=True)
class MinMax:
    """Asymmetric: the range `lo ... hi` (always containing 0) is spread over the grid `0 ... 2**bits - 1`.

    Source: SignRound (arXiv 2309.05516) section 2, equations of s and zp.

    Attributes:
        dtype: stored dtype of the step.
        zero_bits: width of the stored zero point.
    """

    dtype: torch.dtype
    zero_bits: int

    @property
    def part_bits(self) -> int:
        """Bits of the stored step and zero point."""
        return torch.finfo(self.dtype).bits + self.zero_bits

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """`step = cast((hi - lo) / (2**bits - 1))`, `zero = round(-lo / step)`."""
        lo, hi = -stats.lo, stats.hi
        if knobs is not None:
            lo, hi = lo * knobs.lo, hi * knobs.hi
        step = _legal((hi + lo) / (grid.hi - grid.lo), self.dtype)
        zero = round_ste(lo / step).clamp(grid.lo, grid.hi)
        if step.requires_grad:
            return Scale(step, zero)
        return self.read({"step": step.to(self.dtype), "zero": zero.to(torch.uint8)})

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Step and zero point as stored."""
        return Scale(parts["step"].to(torch.float32), parts["zero"].to(torch.float32), parts)

    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """Sizes of the whole range, both ends alike, then one end shorter than the other."""
        for m in torch.linspace(0.45, 0.98, points).tolist():
            knob = torch.full_like(stats.lo, m)
            yield Knobs(knob, knob)
        for lo, hi in permutations(_UNEVEN, 2):
            yield Knobs(torch.full_like(stats.lo, lo), torch.full_like(stats.hi, hi))

    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """One end a little further in or out."""
        for factor in (1 - radius, 1 + radius):
            yield Knobs(knobs.lo * factor, knobs.hi)
            yield Knobs(knobs.lo, knobs.hi * factor)

    def refit(
        self, stats: Stats, grid: Grid, scale: Scale, w: Tensor, n: Tensor, weight: Tensor | None
    ) -> Knobs | None:
        """Least-squares step for the given numbers; both ends are moved alike."""
        weighted = n if weight is None else n * weight
        step = (weighted * w).sum(-1) / (weighted * n).sum(-1).clamp_min(1e-30)
        zero = torch.zeros_like(step) if scale.zero is None else scale.zero
        lo = step * (zero - grid.lo) / (-stats.lo).clamp_min(1e-30)
        hi = step * (grid.hi - zero) / stats.hi.clamp_min(1e-30)
        return Knobs(lo.clamp(0, MAX_KNOB), hi.clamp(0, MAX_KNOB))
