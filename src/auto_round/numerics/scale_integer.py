"""Scales of whole-number formats: one step a group, and a zero point where the grid is not symmetric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from auto_round.numerics.compiled_signed_max import compiled_step
from auto_round.numerics.grid import Grid
from auto_round.numerics.scale import MAX_KNOB, Knobs, Moments, PartSpec, Scale, Stats, legal_step
from auto_round.numerics.search_groups import GroupRule
from auto_round.numerics.ste import clamp_ste, round_ste


@dataclass(frozen=True, slots=True)
class SignedMax(GroupRule):
    """Symmetric, full range: the extreme of larger magnitude is mapped to the grid's lowest number.

    With `Q = 2**(bits-1)` the grid is `-Q ... Q-1`; only `-Q` has the extra level, so the step is negative
    when the larger extreme is positive. Source: `spec int_sym` of SignRound implementations since 0.3.1 and
    llama.cpp's Q4_0 (`ggml-quants.c: quantize_row_q4_0_ref`).

    Attributes:
        dtype: stored dtype of the step.
        reach: smallest and largest range that a search tries first, in units of the measured one.
        flipped_bits: widest grid of which the smaller extreme may get the extra level. At 4 bits that lowers
            the error of the weights but clips the larger extreme, and the model's KL grows by 0.6 %
            (docs/LOG.md).
    """

    dtype: torch.dtype = torch.float16
    reach: tuple[float, float] = (0.45, 1.15)
    flipped_bits: int = 3

    @property
    def stored(self) -> Mapping[str, PartSpec]:
        """The step."""
        return {"step": PartSpec(self.dtype, torch.finfo(self.dtype).bits)}

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """`step = cast(+-max(|lo|, hi) / Q)`, positive when the negative side is larger."""
        step = compiled_step(stats, -grid.lo, knobs, self.dtype)
        if step is None:
            lo, hi = -stats.lo, stats.hi
            if knobs is not None:
                lo, hi = lo * knobs.lo, hi * knobs.hi
            extreme = torch.where(hi < lo, lo, -hi)
            step = legal_step(extreme / -grid.lo, self.dtype)
        if step.requires_grad:
            return Scale(step, None)
        return self.read({"step": step.to(self.dtype)})

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Step as stored."""
        return Scale(parts["step"].to(torch.float32), None, parts)

    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """Sizes of the range, with the larger and, at few bits, the smaller extreme at the lowest number."""
        size, negative = torch.maximum(-stats.lo, stats.hi), -stats.lo > stats.hi
        sides = [_signed_ratio(stats, size, negative)]
        if grid.bits <= self.flipped_bits:
            sides.append(_signed_ratio(stats, size, ~negative))
        for m in torch.linspace(*self.reach, points, dtype=torch.float32, device="cpu").tolist():
            for side in sides:
                yield Knobs((side.lo * m).clamp_max_(MAX_KNOB), (side.hi * m).clamp_max_(MAX_KNOB))

    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """A little wider, a little narrower."""
        for factor in (1 - radius, 1 + radius):
            yield Knobs(knobs.lo * factor, knobs.hi * factor)

    def refit(self, stats: Stats, grid: Grid, scale: Scale, moments: Moments) -> Knobs | None:
        """Least-squares step `sum(i w n) / sum(i n n)`, keeping its sign."""
        step = moments.nw / moments.nn.clamp_min(1e-30)
        return signed_knobs(stats, step.abs() * -grid.lo, scale.step > 0)


def signed_knobs(stats: Stats, size: Tensor, negative: Tensor) -> Knobs:
    """Knobs under which the extreme of `SignedMax` is `-size` where `negative`, else `+size`.

    A side that is (nearly) empty cannot be stretched that far; its multiplier stops at 16.
    """
    ratio = _signed_ratio(stats, size, negative)
    return Knobs(ratio.lo.clamp_max_(MAX_KNOB), ratio.hi.clamp_max_(MAX_KNOB))


def _signed_ratio(stats: Stats, size: Tensor, negative: Tensor) -> Knobs:
    """As `signed_knobs`, however far a side is stretched."""
    ratio = size / torch.where(negative, -stats.lo, stats.hi).clamp_min_(1e-30)
    return Knobs(torch.where(negative, ratio, 0.0), torch.where(negative, 0.0, ratio))


_UNEVEN = (0.7, 0.85, 1.0)
"""Sizes of single ends tried by asymmetric rules: 1 to 2 % less weight error at few bits (docs/LOG.md)."""


def even_starts(stats: Stats, least: float, most: float, points: int) -> Iterator[Knobs]:
    """Sizes of the whole range, both ends alike."""
    for size in torch.linspace(least, most, points, dtype=torch.float32, device="cpu").tolist():
        knob = torch.full_like(stats.lo, size)
        yield Knobs(knob, knob)


def uneven_starts(stats: Stats) -> Iterator[Knobs]:
    """One end of the range shorter than the other."""
    for lo, hi in permutations(_UNEVEN, 2):
        yield Knobs(torch.full_like(stats.lo, lo), torch.full_like(stats.hi, hi))


def end_moves(knobs: Knobs, radius: float) -> Iterator[Knobs]:
    """One end of the range a little further in or out."""
    for factor in (1 - radius, 1 + radius):
        yield Knobs(knobs.lo * factor, knobs.hi)
        yield Knobs(knobs.lo, knobs.hi * factor)


@dataclass(frozen=True, slots=True)
class MinMax(GroupRule):
    """Asymmetric: the range `lo ... hi` (always containing 0) is spread over the grid `0 ... 2**bits - 1`.

    Source: SignRound (arXiv 2309.05516) section 2, equations of s and zp.

    Attributes:
        dtype: stored dtype of the step.
        zero_bits: width of the stored zero point.
    """

    dtype: torch.dtype
    zero_bits: int

    @property
    def stored(self) -> Mapping[str, PartSpec]:
        """Step and zero point."""
        return {
            "step": PartSpec(self.dtype, torch.finfo(self.dtype).bits),
            "zero": PartSpec(torch.uint8, self.zero_bits),
        }

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """`step = cast((hi - lo) / (2**bits - 1))`, `zero = round(-lo / step)`."""
        lo, hi = -stats.lo, stats.hi
        if knobs is not None:
            lo, hi = lo * knobs.lo, hi * knobs.hi
        step = legal_step((hi + lo) / (grid.hi - grid.lo), self.dtype)
        zero = clamp_ste(round_ste(lo / step), grid.lo, grid.hi)
        if step.requires_grad:
            return Scale(step, zero)
        return self.read({"step": step.to(self.dtype), "zero": zero.to(torch.uint8)})

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Step and zero point as stored."""
        return Scale(parts["step"].to(torch.float32), parts["zero"].to(torch.float32), parts)

    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """Sizes of the whole range, both ends alike, then one end shorter than the other."""
        yield from even_starts(stats, 0.45, 0.98, points)
        yield from uneven_starts(stats)

    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """One end a little further in or out."""
        yield from end_moves(knobs, radius)

    def refit(self, stats: Stats, grid: Grid, scale: Scale, moments: Moments) -> Knobs | None:
        """Least-squares step for the given numbers; both ends are moved alike."""
        step = moments.nw / moments.nn.clamp_min(1e-30)
        zero = torch.zeros_like(step) if scale.zero is None else scale.zero
        lo = step * (zero - grid.lo) / (-stats.lo).clamp_min(1e-30)
        hi = step * (grid.hi - zero) / stats.hi.clamp_min(1e-30)
        return Knobs(lo.clamp(0, MAX_KNOB), hi.clamp(0, MAX_KNOB))
