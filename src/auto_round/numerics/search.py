"""Importance-weighted search for the range of each group, over any scale rule.

The search knows nothing of grids: a rule proposes knobs, the format rounds with them, and each group
keeps the knobs of smallest weighted error. With rounding to nearest this is "optimized RTN"; before
tuning it gives the starting point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auto_round.numerics.at_once import weights_at_once
from auto_round.numerics.band import CorrelatedBand, Errors
from auto_round.numerics.compiled_band import squares_band
from auto_round.numerics.format import Format
from auto_round.numerics.grid import Grid
from auto_round.numerics.importance import Importance
from auto_round.numerics.scale import Knobs, SearchableRule, Stats
from auto_round.numerics.scale_two_level import SharedAffine, SharedSigned
from auto_round.numerics.search_shared import SharedSearch

BAND = 1 << 21
"""Weights searched at a time on a CPU: enough to outweigh the calls on small arrays, also of several threads,
which wait for each other between calls (docs/LOG.md)."""


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


FARTHEST = 0.45
"""Ranges are tried again up to this share around the best one by squares alone."""
FIRST_POINTS = 24
FIRST_ROUNDS = 3
"""The first level's effort where a second follows: more would be lost again in rounding to multiples."""
QUICK = Effort(points=10, rounds=2, shared_rounds=1, distances=6)
"""Before tuning: offsets and multipliers are learned afterwards."""
THOROUGH = Effort(points=48, rounds=5, shared_rounds=1, distances=24)
"""For optimized RTN, where nothing follows."""
BY_SQUARES = replace(THOROUGH, along=1.0)
"""The same with importances of a file, which do not tell what cancels. Steps of least squares shrink a
matrix by 2 % at 3 bits. Counting that part of the error twice halves it, and the model's KL falls by 3 % at
2 and 3 bits (docs/LOG.md)."""


def search_knobs(fmt: Format, w: Tensor, importance: Importance | None, effort: Effort) -> Knobs:
    """Knobs of smallest `sum(importance * (w - dequantize(quantize(w)))**2)` in each group.

    What `effort.along` adds to that sum, it counts too.

    Where products of inputs are known, the knobs found so are the start of a second search for the smallest
    mean square of what the errors of a group do to the output. Never worse than the measured range: that is
    the first candidate.

    Args:
        fmt: numeric format.
        w: weight `[..., out, in]`.
        importance: second moments of the `in` inputs; None, or one that is not usable, weighs all the same.
        effort: how long to search.

    Returns:
        Multipliers `[..., rows, n_groups]` in 0 ... 16.
    """
    with torch.no_grad():
        if w.dim() > 2:
            parts = [search_knobs(fmt, m, importance, effort) for m in w.reshape(-1, *w.shape[-2:])]
            lead = w.shape[:-2]
            return Knobs(*(_stack(side, lead) for side in ([p.lo for p in parts], [p.hi for p in parts])))
        rows = max(1, weights_at_once(w.device, BAND) // max(1, w.shape[-1]))
        if fmt.group.size == 0:
            rows = w.shape[0]
        weight = products = None
        if importance is not None and importance.usable:
            together = w.shape[0] if fmt.group.size == 0 else 1
            weight = fmt.group.split(importance.weights(w.device).expand(together, -1))
            products = importance.pieces(fmt.group, w.device)
        bands = [_search(fmt, w[i : i + rows], weight, products, effort) for i in range(0, w.shape[0], rows)]
        return Knobs(torch.cat([b.lo for b in bands]), torch.cat([b.hi for b in bands]))


def _stack(tensors: list[Tensor], lead: torch.Size) -> Tensor:
    return torch.stack(tensors).reshape(*lead, *tensors[0].shape)


def _search(fmt: Format, w: Tensor, weight: Tensor | None, products: Tensor | None, effort: Effort) -> Knobs:
    stats, alone = fmt.stats(w), fmt.rule.alone
    shared = fmt.rule if isinstance(fmt.rule, (SharedSigned, SharedAffine)) else None
    first = effort
    if shared is not None:
        first = replace(effort, points=min(effort.points, FIRST_POINTS), rounds=FIRST_ROUNDS)
    grouped = fmt.group.split(w).to(torch.float32)
    along = effort.along if products is None else 0.0
    band = squares_band(fmt.grid, grouped, weight, along)
    ones = torch.ones_like(stats.lo)
    knobs = _Groups(fmt.grid, alone, stats, band, Knobs(ones, ones)).search(first)
    if products is not None:
        band = CorrelatedBand(grouped, products)
        knobs = _Groups(fmt.grid, alone, stats, band, knobs).search_around(effort.distances)
    if shared is None:
        return knobs
    return SharedSearch(fmt, shared, stats, band).search(knobs, effort.shared_rounds)


class _Groups:
    """Search over the groups of a band of rows, each by itself; keeps the best knobs so far."""

    def __init__(self, grid: Grid, rule: SearchableRule, stats: Stats, band: Errors, start: Knobs) -> None:
        self._grid, self._rule, self._stats, self._band = grid, rule, stats, band
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
