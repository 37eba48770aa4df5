"""Importance-weighted search for the range of each group, over any scale rule.

The search knows nothing of grids: a rule proposes knobs, the format rounds with them, and each group
keeps the knobs of smallest weighted error. With rounding to nearest this is "optimized RTN"; before
tuning it gives the starting point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.format import CHUNK, Format
from auto_round.numerics.scale import Knobs, Scale, Stats


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search.

    Attributes:
        points: sizes of the whole range that are tried first.
        rounds: rounds of local moves and least-squares refits after that.
    """

    points: int
    rounds: int


QUICK = Effort(points=10, rounds=2)
"""Before tuning: offsets and multipliers are learned afterwards."""
THOROUGH = Effort(points=48, rounds=5)
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
        rows = w.shape[0] if fmt.group.size == 0 else max(1, CHUNK // max(1, w.shape[-1]))
        weight = _weights(fmt, w.shape[-1], importance, w)
        bands = [_Band(fmt, w[i : i + rows], weight).search(effort) for i in range(0, w.shape[0], rows)]
        return Knobs(torch.cat([b.lo for b in bands]), torch.cat([b.hi for b in bands]))


def _stack(tensors: list[Tensor], lead: torch.Size) -> Tensor:
    return torch.stack(tensors).reshape(*lead, *tensors[0].shape)


def _weights(fmt: Format, n_in: int, importance: Tensor | None, w: Tensor) -> Tensor | None:
    """Importance as `[1, n_groups, width]`, mean 1, zeros lifted so that no weight is free."""
    if importance is None:
        return None
    flat = importance.to(device=w.device, dtype=torch.float32).reshape(1, n_in)
    mean = flat.mean()
    if not bool(torch.isfinite(mean)) or mean <= 0:
        return None
    flat = (flat / mean).clamp_min(1e-4)
    if fmt.group.size == 0:
        flat = flat.expand(w.shape[0], n_in)
    return fmt.group.split(flat)


class _Band:
    """Search over a band of rows; the best knobs so far are updated in place."""

    def __init__(self, fmt: Format, w: Tensor, weight: Tensor | None) -> None:
        self._fmt = fmt
        self._w = fmt.group.split(w).to(torch.float32)
        self._weight = weight
        self._stats: Stats = fmt.stats(w)
        ones = torch.ones_like(self._stats.lo)
        self._best = Knobs(ones.clone(), ones.clone())
        self._error = self._try(self._best)[0]

    def search(self, effort: Effort) -> Knobs:
        rule = self._fmt.rule
        for knobs in rule.starts(self._stats, self._fmt.grid, effort.points):
            self._consider(knobs)
        for i in range(effort.rounds):
            _, scale, n = self._try(self._best)
            refit = rule.refit(self._stats, self._fmt.grid, scale, self._w, n, self._weight)
            if refit is not None:
                self._consider(refit)
            for knobs in rule.moves(self._best, 0.08 / 2**i):
                self._consider(knobs)
        return self._best

    def _try(self, knobs: Knobs) -> tuple[Tensor, Scale, Tensor]:
        """Weighted error `[rows, n_groups]`, the scale, and grid numbers without the zero point."""
        scale = self._fmt.rule.fit(self._stats, self._fmt.grid, knobs)
        u = self._w * (1.0 / scale.step).unsqueeze(-1)
        n = self._fmt.grid.snap(u, None if scale.zero is None else scale.zero.unsqueeze(-1))
        if scale.zero is not None:
            n = n.sub_(scale.zero.unsqueeze(-1))
        square = u.sub_(n).square_()
        if self._weight is not None:
            square = square.mul_(self._weight)
        return square.sum(-1).mul_(scale.step.square()), scale, n

    def _consider(self, knobs: Knobs) -> None:
        error = self._try(knobs)[0]
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self._best = Knobs(
            torch.where(better, knobs.lo, self._best.lo), torch.where(better, knobs.hi, self._best.hi)
        )
