"""Importance-weighted search for the range of each group, over any scale rule.

The search knows nothing of grids: a rule proposes knobs, the format rounds with them, and each group
keeps the knobs of smallest weighted error. With rounding to nearest this is "optimized RTN"; before
tuning it gives the starting point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auto_round.numerics.band import Band, by_place
from auto_round.numerics.format import Format
from auto_round.numerics.scale import Knobs, Stats
from auto_round.numerics.scale_two_level import SharedAffine, SharedSigned
from auto_round.numerics.search_shared import SharedSearch

BAND = 1 << 18
"""Weights searched at a time: few enough for a cache, enough to outweigh the calls on small arrays."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search.

    Attributes:
        points: sizes of the whole range that are tried first.
        rounds: rounds of local moves and least-squares refits after that.
        shared_rounds: rounds over numbers that groups share.
    """

    points: int
    rounds: int
    shared_rounds: int


FIRST_POINTS = 16
FIRST_ROUNDS = 2
"""The first level's effort where a second follows: more would be lost again in rounding to multiples."""
QUICK = Effort(points=10, rounds=2, shared_rounds=1)
"""Before tuning: offsets and multipliers are learned afterwards."""
THOROUGH = Effort(points=48, rounds=5, shared_rounds=2)
"""For optimized RTN, where nothing follows."""


def search_knobs(fmt: Format, w: Tensor, importance: Tensor | None, effort: Effort) -> Knobs:
    """Knobs of smallest `sum(importance * (w - dequantize(quantize(w)))**2)` in each group.

    Never worse than the measured range: that is the first candidate.

    Args:
        fmt: numeric format.
        w: weight `[..., out, in]`.
        importance: `[in]`, not negative; None, or one without a finite positive mean, weighs all the same.
        effort: how long to search.

    Returns:
        Multipliers `[..., rows, n_groups]` in 0 ... 16.
    """
    with torch.no_grad():
        if w.dim() > 2:
            parts = [search_knobs(fmt, m, importance, effort) for m in w.reshape(-1, *w.shape[-2:])]
            lead = w.shape[:-2]
            return Knobs(*(_stack(side, lead) for side in ([p.lo for p in parts], [p.hi for p in parts])))
        rows = w.shape[0] if fmt.group.size == 0 else max(1, BAND // max(1, w.shape[-1]))
        weight = _weights(fmt, min(rows, w.shape[0]), importance, w)
        bands = [_search(fmt, w[i : i + rows], weight, effort) for i in range(0, w.shape[0], rows)]
        return Knobs(torch.cat([b.lo for b in bands]), torch.cat([b.hi for b in bands]))


def _stack(tensors: list[Tensor], lead: torch.Size) -> Tensor:
    return torch.stack(tensors).reshape(*lead, *tensors[0].shape)


def _weights(fmt: Format, rows: int, importance: Tensor | None, w: Tensor) -> Tensor | None:
    """Importance of a band of `rows`, `[width, rows, n_groups]`, mean 1, zeros lifted: no weight is free."""
    if importance is None:
        return None
    flat = importance.to(device=w.device, dtype=torch.float32).reshape(1, -1)
    mean = flat.mean()
    if not bool(torch.isfinite(mean)) or mean <= 0:
        return None
    flat = (flat / mean).clamp_min(1e-4)
    return by_place(fmt.group.split(flat.expand(rows, -1)))


def _search(fmt: Format, w: Tensor, weight: Tensor | None, effort: Effort) -> Knobs:
    stats = fmt.stats(w)
    places = by_place(fmt.group.split(w).to(torch.float32))
    band = Band(places, None if weight is None else weight[:, : places.shape[1]].contiguous())
    if not isinstance(fmt.rule, (SharedSigned, SharedAffine)):
        return _Groups(fmt, stats, band).search(effort)
    first = replace(effort, points=min(effort.points, FIRST_POINTS), rounds=FIRST_ROUNDS)
    knobs = _Groups(replace(fmt, rule=fmt.rule.alone), stats, band).search(first)
    return SharedSearch(fmt, fmt.rule, stats, band).search(knobs, effort.shared_rounds)


class _Groups:
    """Search over the groups of a band of rows, each by itself; keeps the best knobs so far."""

    def __init__(self, fmt: Format, stats: Stats, band: Band) -> None:
        self._fmt, self._stats, self._band = fmt, stats, band
        ones = torch.ones_like(stats.lo)
        self._best = Knobs(ones.clone(), ones.clone())
        self._error = self._try(self._best)

    def search(self, effort: Effort) -> Knobs:
        rule, grid = self._fmt.rule, self._fmt.grid
        for knobs in rule.starts(self._stats, grid, effort.points):
            self._consider(knobs)
        for i in range(effort.rounds):
            scale = rule.fit(self._stats, grid, self._best)
            refit = rule.refit(self._stats, grid, scale, self._band.moments(grid, scale))
            if refit is not None:
                self._consider(refit)
            for knobs in rule.moves(self._best, 0.08 / 2**i):
                self._consider(knobs)
        return self._best

    def _try(self, knobs: Knobs) -> Tensor:
        return self._band.error(self._fmt.grid, self._fmt.rule.fit(self._stats, self._fmt.grid, knobs))

    def _consider(self, knobs: Knobs) -> None:
        error = self._try(knobs)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self._best = Knobs(
            torch.where(better, knobs.lo, self._best.lo), torch.where(better, knobs.hi, self._best.hi)
        )
