"""Conformance kit for grids: part of `check_format`."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid
from auto_round.testing.failure import require


def every_code(grid: Grid) -> Tensor:
    """All codes of a grid that stand for a number of it, uint8: FP8 has some for infinity or no number."""
    codes = torch.arange(1 << grid.bits).to(torch.uint8)
    numbers = grid.decode(codes)
    return codes[(numbers >= grid.lo) & (numbers <= grid.hi)]


def ladder(grid: Grid) -> Tensor:
    """The distinct numbers of a grid, ascending, float32."""
    numbers = grid.decode(every_code(grid)).sort().values
    return torch.cat([numbers[:1], numbers[1:][numbers.diff() > 0]])


def check_grid(grid: Grid, where: str, *, shifted: bool) -> None:
    """Check every code, every midpoint between two numbers, both ends, and the spacing.

    Args:
        grid: the grid.
        where: what it is called in errors.
        shifted: a zero point is added to its numbers.

    Raises:
        ConformanceError: a promise is broken.
    """
    codes = every_code(grid)
    numbers = grid.decode(codes)
    require(
        torch.equal(grid.decode(grid.encode(numbers)), numbers), f"{where}: decode(encode) changes a number"
    )
    low, high = float(numbers.min()), float(numbers.max())
    require((low, high) == (grid.lo, grid.hi), f"{where}: ends are {grid.lo}, {grid.hi}, not {low}, {high}")
    rungs = ladder(grid)
    if len(rungs) == len(codes):
        require(torch.equal(grid.encode(numbers), codes), f"{where}: encode(decode) changes a code")
    middle = (rungs[:-1] + rungs[1:]) / 2
    infinity = torch.full_like(middle, torch.inf)
    below, above = torch.nextafter(middle, -infinity), torch.nextafter(middle, infinity)
    require(torch.equal(grid.snap(below), rungs[:-1]), f"{where}: rounds up below a midpoint")
    require(torch.equal(grid.snap(above), rungs[1:]), f"{where}: rounds down above a midpoint")
    require(
        bool((grid.encode(grid.snap(middle)) % 2 == 0).all()), f"{where}: a tie does not go to the even code"
    )
    beyond = torch.tensor([-torch.inf, -1e30, low - 0.75, high + 0.75, 1e30, torch.inf])
    ends = torch.tensor([low] * 3 + [high] * 3)
    require(torch.equal(grid.snap(beyond), ends), f"{where}: does not saturate")
    sweep = torch.linspace(1.5 * low - 2, 1.5 * high + 2, 4001)
    snapped = grid.snap(sweep)
    require(bool((snapped.diff() >= 0).all()), f"{where}: snap is not monotone")
    require(torch.equal(grid.decode(grid.encode(snapped)), snapped), f"{where}: snap leaves the grid")
    codes_there = torch.empty_like(codes)
    require(grid.encode(numbers, codes_there) is codes_there, f"{where}: encode ignores the place given")
    require(torch.equal(grid.decode(codes_there), numbers), f"{where}: encode in place differs")
    if shifted:
        _check_shift(grid, where, torch.cat([rungs, middle]))
    _check_spacing(grid, where, rungs)
    place = sweep.clone()
    require(grid.snap(place, None, place) is place, f"{where}: snap does not use the place it is given")
    require(torch.equal(place, snapped), f"{where}: snap in place differs")


def _check_spacing(grid: Grid, where: str, rungs: Tensor) -> None:
    """Between two numbers it is their distance; half of it beyond the ends nothing has saturated."""
    gaps = rungs.diff()
    between = rungs[:-1] + 0.499 * gaps
    spacing = grid.spacing(between)
    found = torch.ones_like(gaps) if spacing is None else spacing
    require(torch.equal(found, gaps), f"{where}: the spacing is not the distance of the numbers")
    first, last = gaps[0], gaps[-1]
    inside = torch.stack([rungs[0] - 0.499 * first, *rungs, rungs[-1] + 0.499 * last])
    outside = torch.stack([rungs[0] - 0.501 * first, rungs[-1] + 0.501 * last])
    require(not bool(grid.saturated(inside).any()), f"{where}: numbers that are reached count as saturated")
    require(
        bool(grid.saturated(outside).all()), f"{where}: numbers beyond the ends do not count as saturated"
    )
    half = float(rungs[-1] - rungs[0]) / 2
    off = abs(grid.end_steps * float(last) - half)
    require(off <= float(last) / 2, f"{where}: the ends are not {grid.end_steps} steps from the middle")


def _check_shift(grid: Grid, where: str, u: Tensor) -> None:
    """The zero point is added after rounding: it may be odd, and must not move ties."""
    for zero in (1.0, 2.0, 3.0):
        want = (grid.snap(u) + zero).clamp(grid.lo, grid.hi)
        got = grid.snap(u, torch.tensor(zero))
        require(torch.equal(got, want), f"{where}: adds the zero point before rounding")
