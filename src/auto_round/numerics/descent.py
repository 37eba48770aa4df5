"""Rounding in which errors cancel: coordinate descent over the codes of weights that see related inputs.

Rounded to nearest, each weight is rounded by itself. But inputs of neighbouring channels rise and fall
together, so that an error of one weight can make up for that of another. One after another each weight
gets the number that is best while all others stay: with errors `e` and mean products `H` of the inputs,
that is the number nearest to where `e_j = -sum(H_jk * e_k for k != j) / H_jj`. No step makes `e @ H @ e`
larger, and scales stay as they are.

Source: QuantEase (arXiv 2309.01885), section 3, here inside of tiles of `importance.TILE` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.numerics.at_once import weights_at_once
from auto_round.numerics.compiled_descent import TOGETHER, compiled_descent
from auto_round.numerics.format import Format
from auto_round.numerics.grid import Grid
from auto_round.numerics.importance import TILE, AnyImportance, Importance
from auto_round.numerics.scale import Knobs, Scale

BAND = 1 << 19
"""Weights at a time on a CPU: what is changed with each weight then stays in a core's cache."""


def cancelling_offsets(
    fmt: Format,
    w: Tensor,
    knobs: Knobs | None,
    importance: AnyImportance | None,
    sweeps: int,
    out: Tensor | None = None,
) -> Tensor | None:
    """Rounding offsets that lead to codes of a smaller error of the layer's output.

    Args:
        fmt: numeric format, bound to the weight where it shares numbers.
        w: `[..., out, in]`.
        knobs: range multipliers; None for the measured range.
        importance: second moments of the inputs; matrices of a stack may have inputs of their own.
        sweeps: how often to go over all weights.
        out: where the result goes, float32; None for memory of its own.

    Returns:
        `v` for `fmt.quantize(w, knobs, v)`, float32, shape of `w`; 0 where a weight is rounded to nearest.
        None where nothing is to be done: no sweeps, or products of inputs are not known.
    """
    if importance is None or not sweeps:
        return None
    with torch.no_grad():
        flat = w.reshape(-1, *w.shape[-2:])
        seen = [importance.matrix(i) for i in range(len(flat))]
        if not any(map(_has_products, seen)):
            return None
        v = torch.empty(w.shape, dtype=torch.float32, device=w.device) if out is None else out
        v.zero_()
        stats = fmt.stats(w)
        scale = fmt.rule_for(stats).fit(stats, fmt.grid, knobs)
        offsets = v.reshape(-1, *w.shape[-2:])
        for matrix, steps, inputs, found in zip(flat, _matrices(scale), seen, offsets, strict=True):
            tiles = None if inputs is None or not _has_products(inputs) else inputs.tiles(w.device)
            if tiles is None:
                continue
            for rows, groups in fmt.group.bands(matrix.shape, weights_at_once(w.device, BAND)):
                band = _Band(fmt, matrix[rows].float(), steps[groups], tiles)
                for _ in range(sweeps):
                    band.sweep()
                found[rows] = band.offsets()
        return v


def _has_products(importance: Importance | None) -> bool:
    """Whether products inside of tiles are known."""
    return importance is not None and importance.products is not None and importance.usable


def _matrices(scale: Scale) -> list[Scale]:
    """Scales of each matrix of a stack."""

    def flat(part: Tensor | None, i: int) -> Tensor | None:
        return None if part is None else part.reshape(-1, *part.shape[-2:])[i]

    step = scale.step.reshape(-1, *scale.step.shape[-2:])
    return [Scale(one, flat(scale.zero, i), floor=flat(scale.floor, i)) for i, one in enumerate(step)]


class _Band:
    """Some rows of a matrix, as `[n_tiles, TILE, rows]`: the weights of a channel lie side by side."""

    def __init__(self, fmt: Format, w: Tensor, scale: Scale, products: Tensor) -> None:
        self._grid: Grid = fmt.grid
        self._products, self._shape = products, w.shape

        def by_channel(per_group: Tensor, fill: float = 0.0) -> Tensor:
            return self._tiles(fmt.group.spread_by_input(per_group, w.shape), fill)

        step = self._step = by_channel(scale.step, fill=1.0)
        self._zero = None if scale.zero is None else by_channel(scale.zero)
        self._u = self._tiles(w.T)
        if scale.floor is not None:
            self._u.add_(by_channel(scale.floor))
        self._u.div_(step)
        self._nearest = self._snap(self._u, self._zero)
        self._error = (self._nearest - self._u).mul_(step)
        self._slope = products @ self._error
        self._compiled = compiled_descent(
            self._grid, products, step, self._u, self._zero, self._error, self._slope
        )
        if self._compiled is None:
            diagonal = products.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            each = (step, self._u, self._error, self._slope, diagonal)
            self._channels = list(zip(*(x.unbind(1) for x in each), strict=True))  # views, made once
            self._zeros = None if self._zero is None else self._zero.unbind(1)
            here = self._error[:, :TOGETHER]
            self._changed = torch.empty_like(here, memory_format=torch.contiguous_format)

    def sweep(self) -> None:
        """Every weight once."""
        stop = min(TILE, self._shape[1])
        if self._compiled is not None:
            self._compiled.sweep(stop)
            return
        for start in range(0, stop, TOGETHER):
            here = slice(start, start + TOGETHER)
            self._improve_all(here)
            for others in (slice(0, start), slice(here.stop, TILE)):
                self._slope[:, others].add_(self._products[:, others, here] @ self._changed)

    def _improve_all(self, here: slice) -> None:
        """The best numbers of the channels `here`; what errors grow by goes to `self._changed`."""
        before = self._error[:, here].clone()
        for j in range(here.start, here.stop):
            self._improve(j, here)
        torch.sub(self._error[:, here], before, out=self._changed)

    def _improve(self, j: int, here: slice) -> None:
        """The best number of channel `j`; slopes of the channels `here` follow."""
        step, u, error, slope, diagonal = self._channels[j]
        best = (slope / diagonal).neg_().add_(error)
        zero = None if self._zeros is None else self._zeros[j]
        change = self._snap(best.div_(step).add_(u), zero).sub_(u).mul_(step).sub_(error)
        self._slope[:, here].addcmul_(self._products[:, here, j, None], change[:, None])
        error.add_(change)

    def offsets(self) -> Tensor:
        """How far the numbers found are from the weights, in spacings of the grid; 0 for the nearest ones."""
        number = torch.div(self._error, self._step).add_(self._u)
        spacing = self._grid.spacing(self._u)
        same = (number - self._nearest).abs_() < (0.25 if spacing is None else 0.25 * spacing)
        away = number.sub_(self._u)
        if spacing is not None:
            away.div_(spacing)
        return away.masked_fill_(same, 0.0).flatten(0, 1)[: self._shape[1]].T

    def _snap(self, u: Tensor, zero: Tensor | None) -> Tensor:
        """Numbers of the grid nearest to `u`, the zero point removed."""
        return self._grid.snap(u) if zero is None else self._grid.snap(u, zero).sub_(zero)

    def _tiles(self, w: Tensor, fill: float = 0.0) -> Tensor:
        """`[in, rows]` as `[n_tiles, TILE, rows]`, in memory of its own."""
        n_in, rows = w.shape
        tiles = torch.empty(-(-n_in // TILE) * TILE, rows, dtype=w.dtype, device=w.device)
        tiles[:n_in].copy_(w)
        tiles[n_in:].fill_(fill)
        return tiles.view(-1, TILE, rows)
