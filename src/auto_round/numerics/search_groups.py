"""Range search, group by group: knobs are tried on the weights, and those of the smallest error are kept.

The scale rule proposes the knobs; the search itself knows neither grids nor scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from auto_round.numerics.band import Errors
from auto_round.numerics.compiled_band import squares_band
from auto_round.numerics.compiled_correlated import correlated_band
from auto_round.numerics.grid import Grid
from auto_round.numerics.rule import Effort, SearchTask, SelfBound
from auto_round.numerics.scale import Knobs, Moments, Scale, Stats

FARTHEST = 0.45
"""Where products of inputs are known, how far around the first search's knobs the second one looks: 0.45
tries ranges from 55 % to 145 %."""


class GroupRule(SelfBound, ABC):
    """A rule under which a group's scale follows from that group alone, all shared numbers being known.

    A new rule implements `stored`, `read` and the four abstract methods; this class adds the search.
    """

    __slots__ = ()

    @property
    def tunable(self) -> bool:
        """Knobs move the scale of their own group only."""
        return True

    def search(self, task: SearchTask, effort: Effort) -> Knobs:
        """Knobs of the smallest error found; each group is searched by itself."""
        return search_groups(self, task, effort)[0]

    @abstractmethod
    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """Scale of each group."""

    @abstractmethod
    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """Knobs worth trying first in a search, about `points` sizes of the range."""

    @abstractmethod
    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """Knobs beside `knobs`: one end of the range, or both, times about `1 - radius` and `1 + radius`."""

    @abstractmethod
    def refit(self, stats: Stats, grid: Grid, scale: Scale, moments: Moments) -> Knobs | None:
        """Knobs of the least-squares scale while codes stay; None where there is no such scale.

        Args:
            stats: measured ranges.
            grid: numbers that weights are rounded to.
            scale: what weights were rounded with.
            moments: sums over the numbers that they were rounded to.
        """


def search_groups(rule: GroupRule, task: SearchTask, effort: Effort) -> tuple[Knobs, Errors]:
    """Knobs of the smallest error found for each group; the measured range is the first candidate.

    The first search minimizes `sum(importance * e**2)`. Where products of inputs are known, a second one
    starts there and minimizes `e @ products @ e`, the mean square of a group's share of the output's error.

    Returns:
        The knobs, and the errors and sums of the last search for whoever searches on.
    """
    along = effort.along if task.products is None else 0.0
    band = squares_band(task.grid, task.w, task.importance, along)
    ones = torch.ones_like(task.stats.lo)
    knobs = _Search(rule, task, band, Knobs(ones, ones)).search(effort)
    if task.products is None:
        return knobs, band
    correlated = correlated_band(task.grid, task.w, task.products)
    return _Search(rule, task, correlated, knobs).search_around(effort.distances), correlated


class _Search:
    """Search over the groups of a band of rows, each by itself; keeps the best knobs so far."""

    def __init__(self, rule: GroupRule, task: SearchTask, band: Errors, start: Knobs) -> None:
        self._grid, self._rule, self._stats, self._band = task.grid, rule, task.stats, band
        self._best = start
        self._error = self._try(start)

    def search(self, effort: Effort) -> Knobs:
        """Try the rule's starts; then refit and move, each round half as far as the one before."""
        for knobs in self._rule.starts(self._stats, self._grid, effort.points):
            self._consider(knobs)
        for i in range(effort.rounds):
            self._improve(0.08 / 2**i)
        return self._best

    def search_around(self, distances: int) -> Knobs:
        """Try moves from the start as far as `FARTHEST`; then refit and move, each round half as far."""
        start = self._best
        for i in range(distances):
            for knobs in self._rule.moves(start, FARTHEST * (i + 1) / distances):
                self._consider(knobs)
        for i in range(distances // 6):
            self._improve(0.03 / 2**i)
        return self._best

    def _improve(self, radius: float) -> None:
        scale = self._rule.fit(self._stats, self._grid, self._best)
        refit = self._rule.refit(self._stats, self._grid, scale, self._band.moments(self._grid, scale))
        if refit is not None:
            self._consider(refit)
        for knobs in self._rule.moves(self._best, radius):
            self._consider(knobs)

    def _try(self, knobs: Knobs) -> Tensor:
        return self._band.error(self._grid, self._rule.fit(self._stats, self._grid, knobs))

    def _consider(self, knobs: Knobs) -> None:
        error = self._try(knobs)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self._best = Knobs(
            torch.where(better, knobs.lo, self._best.lo), torch.where(better, knobs.hi, self._best.hi)
        )
