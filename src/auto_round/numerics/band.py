"""A band of rows for the range search: the error of each group, and its least-squares sums, for any scale.

With errors `e = dequantized - w`, `Band` measures `sum(importance * e**2)`: each weight by itself.
`CorrelatedBand` measures `e @ products @ e`, where errors of different weights may cancel.
"""

from __future__ import annotations

from typing import Protocol

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


class Errors(Protocol):
    """What a search needs to know of a band of rows."""

    def error(self, grid: Grid, scale: Scale) -> Tensor:
        """Weighted squared error of each group, `[rows, n_groups]`, when rounded with `scale`."""
        ...

    def moments(self, grid: Grid, scale: Scale) -> Moments:
        """Sums over the numbers that weights are rounded to with `scale`, less the zero point."""
        ...


class Band:
    """Weights `[width, rows, n_groups]` float32 and their importance, same shape (None for 1).

    All candidates are computed in the same three buffers: fresh memory costs more than the arithmetic.

    Args:
        w: the weights.
        importance: of their errors.
        along: extra weight of errors in proportion to the weights themselves. With errors `e` and the
            importance `i`, the error of a group is
            `sum(i * e**2) + along * sum(i * e * w)**2 / sum(i * w**2)`. The second term is the part of `e`
            that lies along `w`: it makes a layer's output shorter or longer, and in all layers alike, so
            that it does not average out.
    """

    def __init__(self, w: Tensor, importance: Tensor | None, along: float = 0.0) -> None:
        self._w, self._importance = w, importance
        self._u, self._n, self._product = (torch.empty_like(w) for _ in range(3))
        if importance is None:
            self._one = torch.full(w.shape[1:], float(w.shape[0]), dtype=torch.float32, device=w.device)
            self._sum = fold(w.clone(), 0)
        else:
            self._one = fold(importance.clone(), 0)
            self._sum = fold(w * importance, 0)
        self._along = None
        if along:
            size = w.square() if importance is None else w.square() * importance
            self._along = along / fold(size, 0).clamp_min(1e-30)

    def error(self, grid: Grid, scale: Scale) -> Tensor:
        """Weighted squared error of each group, `[rows, n_groups]`, when rounded with `scale`."""
        u, n = self._round(grid, scale)
        off = u.sub_(n)
        along: Tensor | float = 0.0
        if self._along is not None:  # along * sum(i * e * w)**2 / sum(i * w**2), in units of the step
            products = torch.mul(off, self._w, out=self._product)
            if self._importance is not None:
                products.mul_(self._importance)
            along = fold(products, 0).square() * self._along
        square = off.square_()
        if self._importance is not None:
            square.mul_(self._importance)
        return (fold(square, 0) + along) * scale.step.square()

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
        return _round(self._w, grid, scale, self._u, self._n)


class CorrelatedBand:
    """Weights of a band of rows and the mean products of the inputs that they are multiplied by.

    Sums over a group become products with the matrix `products`: `sum(i * n * w)` is `n @ products @ w`.

    Args:
        w: `[rows, n_groups, width]` float32.
        products: `[n_groups * k, piece, piece]` float32, `mean(x x')` of the inputs `x` of each piece. A
            group is cut into `k` pieces; the last piece of a row may be filled up with zeros.
    """

    def __init__(self, w: Tensor, products: Tensor) -> None:
        rows, self._n_groups, width = w.shape
        count, piece, _ = products.shape
        self._per_group = count // self._n_groups
        if missing := self._per_group * piece - width:
            w = torch.nn.functional.pad(w, (0, missing))
        self._w = w.reshape(rows, count, piece).transpose(0, 1).contiguous()
        self._products = products
        self._u, self._n, self._cost = (torch.empty_like(self._w) for _ in range(3))
        each = products.sum(-1)
        self._each = each.unsqueeze(1)
        self._one = self._by_group(each.sum(-1, keepdim=True).expand(count, rows))
        self._sum = self._by_group((self._w * self._each).sum(-1))

    def error(self, grid: Grid, scale: Scale) -> Tensor:
        """Mean square of each group's share of the output's error, `e @ products @ e`, `[rows, n_groups]`."""
        u, n = self._round(grid, scale)
        u.sub_(n)
        cost = torch.bmm(u, self._products, out=self._cost).mul_(u)
        return self._by_group(cost.sum(-1)) * scale.step.square()

    def moments(self, grid: Grid, scale: Scale) -> Moments:
        """Sums over the numbers that `scale` leads to, zero point removed."""
        u, n = self._round(grid, scale)
        cost = torch.bmm(n, self._products, out=self._cost)
        nn = self._by_group(torch.mul(cost, n, out=u).sum(-1))
        nw = self._by_group(torch.mul(cost, self._w, out=u).sum(-1))
        return Moments(self._one, self._by_group(torch.mul(n, self._each, out=u).sum(-1)), self._sum, nn, nw)

    def _round(self, grid: Grid, scale: Scale) -> tuple[Tensor, Tensor]:
        zero, floor = scale.zero, scale.floor
        here = Scale(
            self._by_piece(scale.step),
            None if zero is None else self._by_piece(zero),
            floor=None if floor is None else self._by_piece(floor),
        )
        return _round(self._w, grid, here, self._u, self._n)

    def _by_piece(self, x: Tensor) -> Tensor:
        """`[rows, n_groups]` -> `[n_groups * k, rows, 1]`."""
        return x.T.repeat_interleave(self._per_group, 0).unsqueeze(-1)

    def _by_group(self, x: Tensor) -> Tensor:
        """`[n_groups * k, rows]` -> `[rows, n_groups]`, summed."""
        return x.reshape(self._n_groups, self._per_group, -1).sum(1).T


def _round(w: Tensor, grid: Grid, scale: Scale, u: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in units of the step, into `u`, and their numbers, into `n`; both without the zero point."""
    inverse = 1.0 / scale.step
    if scale.floor is None:
        u = torch.mul(w, inverse, out=u)
    else:
        u = torch.addcmul(scale.floor * inverse, w, inverse, out=u)
    n = grid.snap(u, scale.zero, out=n)
    if scale.zero is not None:
        n.sub_(scale.zero)
    return u, n
