"""Steps of `descent` by a C program on CPUs: the same bits from one pass over memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from auto_round.compiled import addresses, can_read, numeric_library, threads_for
from auto_round.numerics.compiled_rounding import OPTIONS
from auto_round.numerics.grid import Grid, IntGrid
from auto_round.numerics.importance import TILE

SOURCE = Path(__file__).with_name("descent.c")

TOGETHER = 16
"""Channels after which a change is passed on to all others of the tile, in one product."""


class _Request(ctypes.Structure):
    """`Band` of the program."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("products", "step", "u", "zero", "error", "slope")),
        *((name, ctypes.c_float) for name in ("lo", "hi")),
        *((name, ctypes.c_int64) for name in ("tiles", "rows")),
        ("threads", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True)
class CompiledDescent:
    """The weights of a band as `descent` keeps them, all `[n_tiles, TILE, rows]` float32 and contiguous.

    Attributes:
        program: the compiled library.
        request: where they lie.
        tensors: they themselves, so that they stay where they are.
    """

    program: ctypes.CDLL
    request: _Request
    tensors: tuple[Tensor | None, ...]

    def sweep(self, stop: int) -> None:
        """Give each of the first `stop` channels of every tile its best number."""
        self.program.auto_round_sweep(ctypes.byref(self.request), ctypes.c_int64(stop))


def compiled_descent(
    grid: Grid, products: Tensor, step: Tensor, u: Tensor, zero: Tensor | None, error: Tensor, slope: Tensor
) -> CompiledDescent | None:
    """Steps by the C program, which change `error` and `slope`; None where PyTorch has to make them."""
    tensors = (products, step, u, zero, error, slope)
    if type(grid) is not IntGrid or not can_read(*(x for x in tensors if x is not None)):
        return None
    program = _program()
    if program is None:
        return None
    tiles, _, rows = u.shape
    request = _Request(
        *addresses(*tensors),
        grid.lo,
        grid.hi,
        tiles,
        rows,
        threads_for(u.numel()),
    )
    return CompiledDescent(program, request, tensors)


def _program() -> ctypes.CDLL | None:
    """The compiled program; None where it cannot be made."""
    return numeric_library(
        SOURCE,
        (*OPTIONS, f"-DTILE={TILE}", f"-DTOGETHER={TOGETHER}"),
        "codes are searched without a compiled program, which takes longer",
    )
