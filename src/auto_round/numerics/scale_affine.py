"""Affine scales: a step and a floor in units of the weights instead of a whole zero point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid
from auto_round.numerics.scale import MAX_KNOB, Knobs, Moments, PartSpec, Scale, Stats, legal_step
from auto_round.numerics.scale_integer import end_moves, even_starts, uneven_starts
from auto_round.numerics.search_groups import GroupRule
from auto_round.numerics.ste import cast_ste, clamp_ste

_SIZES = 5
"""Most sizes of the range tried first. Least-squares lines find the rest, and end at larger errors when they
begin from more sizes."""
_UNEVEN_BITS = 3
"""Widest grid for which ranges with one shorter end are tried: 2.5 % less error at 2 bits, 1 % more at 4."""


@dataclass(frozen=True, slots=True)
class Affine(GroupRule):
    """Asymmetric: `w = n * step + min`, the range `lo ... hi` (always containing 0) spread over the grid.

    Source: llama.cpp's Q4_1 and Q5_1 (`ggml-common.h: block_q4_1`, fields `d` and `m`); arithmetic of
    gguf-py 0.19 `quants.py`, where adding `m` and subtracting `-m` are the same operation.

    Attributes:
        dtype: stored dtype of step and minimum.
    """

    dtype: torch.dtype = torch.float16

    @property
    def stored(self) -> Mapping[str, PartSpec]:
        """Step and minimum."""
        part = PartSpec(self.dtype, torch.finfo(self.dtype).bits)
        return {"step": part, "min": part}

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """`step = cast((hi - lo) / (grid.hi - grid.lo))`, `min = cast(lo)`."""
        wide, floor = step_and_floor(stats, grid, knobs)
        step = legal_step(wide, self.dtype)
        most = torch.finfo(self.dtype).max
        floor = cast_ste(clamp_ste(floor, -most, most), self.dtype)
        if step.requires_grad:
            return Scale(step, None, floor=floor)
        return self.read({"step": step.to(self.dtype), "min": -floor.to(self.dtype)})

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Step and floor as stored."""
        return Scale(parts["step"].to(torch.float32), None, parts, -parts["min"].to(torch.float32))

    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """Sizes of the range, both ends alike; at few bits then one end shorter than the other."""
        yield from even_starts(stats, 0.6, 1.0, min(points, _SIZES))
        if grid.bits <= _UNEVEN_BITS:
            yield from uneven_starts(stats)

    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """One end a little further in or out."""
        yield from end_moves(knobs, radius)

    def refit(self, stats: Stats, grid: Grid, scale: Scale, moments: Moments) -> Knobs | None:
        """Knobs of the line of least squares through `(n, w)`."""
        return affine_knobs(stats, grid, *line(moments))


def step_and_floor(stats: Stats, grid: Grid, knobs: Knobs | None) -> tuple[Tensor, Tensor]:
    """Unrounded step and floor (both at least 0) of a range and its multipliers."""
    lo, hi = -stats.lo, stats.hi
    if knobs is not None:
        lo, hi = lo * knobs.lo, hi * knobs.hi
    return (hi + lo) / (grid.hi - grid.lo), lo


def affine_knobs(stats: Stats, grid: Grid, step: Tensor, floor: Tensor) -> Knobs:
    """Multipliers that lead to `step` and `floor`, inverse of `step_and_floor` within 0 ... 16."""
    lo = floor / (-stats.lo).clamp_min(1e-30)
    hi = (step * (grid.hi - grid.lo) - floor) / stats.hi.clamp_min(1e-30)
    return Knobs(lo.clamp(0, MAX_KNOB), hi.clamp(0, MAX_KNOB))


def line(moments: Moments) -> tuple[Tensor, Tensor]:
    """Least-squares step and floor of each group: where `sum(i * (n * step - floor - w)**2)` is least.

    Floors are not negative: where the best one would be, the step of the best line through zero and no floor.
    """
    m = moments
    free = m.one * m.nn - m.n.square()
    slope = (m.one * m.nw - m.n * m.w) / free
    floor = (m.n * m.nw - m.nn * m.w) / free
    usable = (free > 1e-6 * m.one * m.nn) & (floor > 0)
    through_zero = m.nw / m.nn.clamp_min(1e-30)
    return torch.where(usable, slope, through_zero), torch.where(usable, floor, torch.zeros_like(floor))
