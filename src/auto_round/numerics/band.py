"""Weights of a band of rows as the search sees them: errors and sums of each group for any scale."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid
from auto_round.numerics.scale import Moments, Scale


def by_place(grouped: Tensor) -> Tensor:
    """`[rows, n_groups, width]` as `[width, rows, n_groups]`, contiguous.

    Scales of neighbouring groups then lie side by side: every operation runs along long rows of memory,
    which is several times faster than groups of 16 or 32.
    """
    return grouped.permute(2, 0, 1).contiguous()


def fold(x: Tensor, dim: int) -> Tensor:
    """Sum over one axis, pair by pair; `x` is overwritten.

    The order of additions depends on the length of the axis alone, so that a group's sum is the same bits
    whatever else is in the tensor.
    """
    length = x.shape[dim]
    while length > 1:
        half, odd = divmod(length, 2)
        x.narrow(dim, 0, half).add_(x.narrow(dim, half + odd, half))
        length = half + odd
    return x.select(dim, 0)


class Band:
    """Weights `[width, rows, n_groups]` float32 and their importance, same shape (None for 1).

    All candidates are computed in the same three buffers: fresh memory costs more than the arithmetic.
    """

    def __init__(self, w: Tensor, importance: Tensor | None) -> None:
        self._w, self._importance = w, importance
        self._u, self._n, self._product = (torch.empty_like(w) for _ in range(3))
        if importance is None:
            self._one = torch.full(w.shape[1:], float(w.shape[0]), device=w.device)
            self._sum = fold(w.clone(), 0)
        else:
            self._one = fold(importance.clone(), 0)
            self._sum = fold(w * importance, 0)

    def error(self, grid: Grid, scale: Scale) -> Tensor:
        """Weighted squared error of each group, `[rows, n_groups]`, when rounded with `scale`."""
        u, n = self._round(grid, scale)
        square = u.sub_(n).square_()
        if self._importance is not None:
            square.mul_(self._importance)
        return fold(square, 0) * scale.step.square()

    def moments(self, grid: Grid, scale: Scale) -> Moments:
        """Sums over the numbers that `scale` leads to, zero point removed."""
        weighted, n = self._round(grid, scale)
        if self._importance is None:
            weighted.copy_(n)
        else:
            torch.mul(n, self._importance, out=weighted)
        nn = fold(torch.mul(weighted, n, out=self._product), 0).clone()
        nw = fold(torch.mul(weighted, self._w, out=self._product), 0).clone()
        return Moments(self._one, fold(weighted, 0).clone(), self._sum, nn, nw)

    def _round(self, grid: Grid, scale: Scale) -> tuple[Tensor, Tensor]:
        """Weights in units of the step, and their numbers; both without the zero point."""
        inverse = 1.0 / scale.step
        u = torch.mul(self._w, inverse, out=self._u)
        if scale.floor is not None:
            u.add_(scale.floor * inverse)
        n = grid.snap(u, scale.zero, out=self._n)
        if scale.zero is not None:
            n.sub_(scale.zero)
        return u, n
