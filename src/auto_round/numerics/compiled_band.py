"""`Band` computed by a C program on CPUs: the same bits from one pass over the weights instead of eight."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from auto_round.compiled import addresses, numeric_library
from auto_round.numerics.band import Band, Errors, by_place
from auto_round.numerics.grid import Grid, IntGrid
from auto_round.numerics.scale import Moments, Scale

SOURCE = Path(__file__).with_name("band.c")

LANES = 16
"""Groups in a tile of the program."""


class _Request(ctypes.Structure):
    """`Band` of the program."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "importance", "step", "zero", "floor", "along")),
        *((name, ctypes.c_float) for name in ("lo", "hi")),
        *((name, ctypes.c_int64) for name in ("n_groups", "period", "width")),
        ("threads", ctypes.c_int),
    )


class CompiledBand:
    """What `Band` says of weights `[rows, n_groups, width]` float32, for grids of whole numbers.

    Args:
        program: the compiled library.
        w: the weights, on the CPU.
        importance: of each place of a row, `[1, n_groups, width]` float32; None for 1.
        along: as for `Band`.
    """

    def __init__(
        self, program: ctypes.CDLL, w: Tensor, importance: Tensor | None, along: float = 0.0
    ) -> None:
        self._program, self._groups = program, w.shape[:2]
        rows, n_groups, width = w.shape
        self._count, self._width = rows * n_groups, width
        tiles = torch.nn.functional.pad(w.reshape(-1, width), (0, 0, 0, -self._count % LANES))
        self._w = tiles.reshape(-1, LANES, width).transpose(1, 2).contiguous()
        each = w.new_ones(n_groups, width) if importance is None else importance[0]
        self._period = n_groups
        self._importance = each.T.repeat(1, 1 + -(-LANES // n_groups))[:, : n_groups + LANES].contiguous()
        self._one = each.sum(-1).expand(rows, -1)
        self._sum = (w * each).sum(-1)
        self._along = along / (w.square() * each).sum(-1).clamp_min(1e-30) if along else None

    def error(self, grid: Grid, scale: Scale) -> Tensor:
        """Weighted squared error of each group, `[rows, n_groups]`, when rounded with `scale`."""
        return self._ask(self._program.auto_round_errors, grid, scale, 1)[0]

    def moments(self, grid: Grid, scale: Scale) -> Moments:
        """Sums over the numbers that `scale` leads to, zero point removed."""
        n, nn, nw = self._ask(self._program.auto_round_moments, grid, scale, 3)
        return Moments(self._one, n, self._sum, nn, nw)

    def _ask(self, function: Callable[..., object], grid: Grid, scale: Scale, count: int) -> list[Tensor]:
        parts = [
            None if x is None else x.contiguous() for x in (scale.step, scale.zero, scale.floor, self._along)
        ]
        out = [torch.empty(self._groups, dtype=torch.float32, device="cpu") for _ in range(count)]
        request = _Request(
            *addresses(self._w, self._importance, *parts),
            grid.lo,
            grid.hi,
            self._count,
            self._period,
            self._width,
            torch.get_num_threads(),
        )
        function(ctypes.byref(request), *addresses(*out))
        return out


def squares_band(grid: Grid, w: Tensor, importance: Tensor | None, along: float = 0.0) -> Errors:
    """`Band` for these weights: by the C program where it can be used, else by PyTorch.

    Args:
        grid: that the weights are to be rounded to.
        w: `[rows, n_groups, width]` float32.
        importance: of each place of a row, `[1, n_groups, width]` float32; None for 1.
        along: as for `Band`.
    """
    program = _program() if w.device.type == "cpu" and type(grid) is IntGrid else None
    if program is not None:
        return CompiledBand(program, w, importance, along)
    return Band(by_place(w), None if importance is None else by_place(importance.expand_as(w)), along)


def _program() -> ctypes.CDLL | None:
    """The compiled program; None where it cannot be made."""
    return numeric_library(
        SOURCE,
        (f"-DLANES={LANES}",),
        "ranges are searched without a compiled program, which takes about twice as long",
    )
