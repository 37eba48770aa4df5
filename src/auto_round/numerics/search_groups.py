"""Range search of groups that share nothing: each keeps the knobs of its own smallest error.

The search knows nothing of grids: a rule proposes knobs, and what they lead to is tried on the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.band import CorrelatedBand, Errors
from auto_round.numerics.compiled_band import squares_band
from auto_round.numerics.grid import Grid
from auto_round.numerics.scale import Knobs, Moments, Scale, SelfBound, Stats

FARTHEST = 0.45
"""Ranges are tried again up to this share around the best one by squares alone."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search.

    Attributes:
        points: sizes of the whole range that are tried first.
        rounds: rounds of local moves and least-squares refits after that.
        shared_rounds: rounds over numbers that groups share.
        distances: how far around what was found ranges are tried again, where products of inputs are known;
            one round of moves and refits follows each six.
        along: what errors along a group's own weights count in addition, where products are not known.
    """

    points: int
    rounds: int
    shared_rounds: int
    distances: int
    along: float = 0.0


@dataclass(frozen=True, slots=True)
class SearchTask:
    """Some rows of a weight whose ranges are searched.

    Attributes:
        grid: numbers that weights are rounded to.
        stats: measured ranges, `[rows, n_groups]`.
        w: the weights, `[rows, n_groups, width]` float32.
        importance: what a squared error costs at each place of a row, `[1, n_groups, width]`; None for 1.
        products: mean products of the inputs of a group, see `Importance.pieces`; None where not known.
    """

    grid: Grid
    stats: Stats
    w: Tensor
    importance: Tensor | None
    products: Tensor | None


class GroupRule(SelfBound, ABC):
    """A rule whose groups share nothing with others, or nothing that it does not know."""

    __slots__ = ()

    @property
    def tunable(self) -> bool:
        """Knobs move the scale of their own group only."""
        return True

    def search(self, task: SearchTask, effort: Effort) -> Knobs:
        """Each group by itself."""
        return search_groups(self, task, effort)[0]

    @abstractmethod
    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """Scale of each group."""

    @abstractmethod
    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """Knobs worth trying first in a search, about `points` sizes of the range."""

    @abstractmethod
    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """Neighbours of `knobs` at about `radius`."""

    @abstractmethod
    def refit(self, stats: Stats, grid: Grid, scale: Scale, moments: Moments) -> Knobs | None:
        """Knobs of the least-squares scale for the grid numbers that `scale` led to; None without one."""


def search_groups(rule: GroupRule, task: SearchTask, effort: Effort) -> tuple[Knobs, Errors]:
    """Knobs of smallest error of each group, beginning with the measured range.

    Where products of inputs are known, the knobs found by squares alone are the start of a second search for
    the smallest mean square of what the errors of a group do to the output.

    Returns:
        The knobs, and what the last search asked about the weights.
    """
    along = effort.along if task.products is None else 0.0
    band = squares_band(task.grid, task.w, task.importance, along)
    ones = torch.ones_like(task.stats.lo)
    knobs = _Search(rule, task, band, Knobs(ones, ones)).search(effort)
    if task.products is None:
        return knobs, band
    correlated = CorrelatedBand(task.w, task.products)
    return _Search(rule, task, correlated, knobs).search_around(effort.distances), correlated


class _Search:
    """Search over the groups of a band of rows, each by itself; keeps the best knobs so far."""

    def __init__(self, rule: GroupRule, task: SearchTask, band: Errors, start: Knobs) -> None:
        self._grid, self._rule, self._stats, self._band = task.grid, rule, task.stats, band
        self._best = start
        self._error = self._try(start)

    def search(self, effort: Effort) -> Knobs:
        """Over the rule's own starts, then by refits and ever smaller moves."""
        for knobs in self._rule.starts(self._stats, self._grid, effort.points):
            self._consider(knobs)
        for i in range(effort.rounds):
            self._improve(0.08 / 2**i)
        return self._best

    def search_around(self, distances: int) -> Knobs:
        """Around the start, as far as `FARTHEST`, then by refits and ever smaller moves."""
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
