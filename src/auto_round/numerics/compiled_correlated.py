"""`CorrelatedBand` computed by a C program on CPUs: one pass over the weights, and half of the products.

Its sums run in another order than those of PyTorch, so that errors differ by their last bits: which of two
ranges of nearly the same error is found may differ too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from auto_round.compiled import addresses, numeric_library
from auto_round.numerics.band import CorrelatedBand, Errors
from auto_round.numerics.grid import Grid, IntGrid
from auto_round.numerics.importance import TILE
from auto_round.numerics.scale import Moments, Scale

SOURCE = Path(__file__).with_name("correlated.c")

ROWS = 32
"""Rows in a tile of the program: with `TILE` channels a tile takes 16 KiB, half of a core's nearest cache."""

MULTIPLE = 8
"""Channels that the program sums at a time, at most; a piece has a multiple of them."""


class _Request(ctypes.Structure):
    """`Band` of the program."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "products", "each", "step", "zero", "floor")),
        *((name, ctypes.c_float) for name in ("lo", "hi")),
        *((name, ctypes.c_int64) for name in ("pieces", "per_group", "tiles", "piece", "rows")),
        ("threads", ctypes.c_int),
    )


class CompiledCorrelated:
    """What `CorrelatedBand` says of weights `[rows, n_groups, width]` float32, for grids of whole numbers.

    Args:
        program: the compiled library.
        w: the weights, on the CPU.
        products: `[n_groups * k, piece, piece]` float32, as for `CorrelatedBand`; symmetric.
    """

    def __init__(self, program: ctypes.CDLL, w: Tensor, products: Tensor) -> None:
        self._program, self._products = program, products.contiguous()
        self._rows, self._n_groups, width = w.shape
        self._count, self._piece, _ = products.shape
        self._per_group = self._count // self._n_groups
        if missing := self._per_group * self._piece - width:
            w = torch.nn.functional.pad(w, (0, missing))
        pieces = w.reshape(self._rows, self._count, self._piece)
        self._w = self._tiles(pieces)
        self._each = self._products.sum(-1)
        self._one = self._by_group(self._each.sum(-1, keepdim=True).expand(-1, self._rows))
        self._sum = self._by_group((pieces.transpose(0, 1) @ self._each.unsqueeze(-1)).squeeze(-1))

    def error(self, grid: Grid, scale: Scale) -> Tensor:
        """Mean square of each group's share of the output's error, `e @ products @ e`, `[rows, n_groups]`."""
        return self._ask(self._program.auto_round_correlated_errors, grid, scale, 1)[0]

    def moments(self, grid: Grid, scale: Scale) -> Moments:
        """Sums over the numbers that `scale` leads to, zero point removed."""
        n, nn, nw = self._ask(self._program.auto_round_correlated_moments, grid, scale, 3)
        return Moments(self._one, n, self._sum, nn, nw)

    def _ask(self, function: Callable[..., object], grid: Grid, scale: Scale, count: int) -> list[Tensor]:
        parts = [None if x is None else x.T.contiguous() for x in (scale.step, scale.zero, scale.floor)]
        out = [torch.empty(self._count, self._rows, dtype=torch.float32, device="cpu") for _ in range(count)]
        request = _Request(
            *addresses(self._w, self._products, self._each, *parts),
            grid.lo,
            grid.hi,
            self._count,
            self._per_group,
            self._w.shape[1],
            self._piece,
            self._rows,
            torch.get_num_threads(),
        )
        function(ctypes.byref(request), *addresses(*out))
        return [self._by_group(x) for x in out]

    def _tiles(self, pieces: Tensor) -> Tensor:
        """`[rows, pieces, piece]` as `[pieces, tiles, piece, ROWS]`."""
        filled = torch.nn.functional.pad(pieces, (0, 0, 0, 0, 0, -self._rows % ROWS))
        tiles = filled.reshape(-1, ROWS, self._count, self._piece)
        return tiles.permute(2, 0, 3, 1).contiguous()

    def _by_group(self, x: Tensor) -> Tensor:
        """`[n_groups * k, rows]` -> `[rows, n_groups]`, summed."""
        return x.reshape(self._n_groups, self._per_group, -1).sum(1).T


def correlated_band(grid: Grid, w: Tensor, products: Tensor) -> Errors:
    """`CorrelatedBand` for these weights: by the C program where it can be used, else by PyTorch.

    Args:
        grid: that the weights are to be rounded to.
        w: `[rows, n_groups, width]` float32.
        products: as for `CorrelatedBand`.
    """
    usable = w.device.type == "cpu" and type(grid) is IntGrid and products.shape[-1] % MULTIPLE == 0
    program = _program() if usable else None
    return CorrelatedBand(w, products) if program is None else CompiledCorrelated(program, w, products)


def _program() -> ctypes.CDLL | None:
    """The compiled program; None where it cannot be made."""
    return numeric_library(
        SOURCE,
        ("-ffp-contract=fast", f"-DROWS={ROWS}", f"-DPIECE={TILE}"),
        "ranges are searched without a compiled program, which takes about five times as long",
    )
