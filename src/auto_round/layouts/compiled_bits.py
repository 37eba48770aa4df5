"""Words of 4-bit codes by a C program on CPUs: one pass, without transposed copies; bytes as by `bits.py`."""

from __future__ import annotations

import ctypes
from pathlib import Path

from torch import Tensor

from auto_round.compiled import addresses, can_read, numeric_library, threads_for

SOURCE = Path(__file__).with_name("bits.c")

BITS = 4
"""Width that the program knows: that of nearly all packed models."""


def packs(codes: Tensor, bits: int, words: Tensor) -> bool:
    """Pack by the program.

    Args:
        codes: `[rows, n]` uint8.
        bits: width of a code.
        words: where words go, `[rows, n * bits / 32]` int32.

    Returns:
        False where PyTorch has to do it; then nothing was done.
    """
    return bits == BITS and _run("pack", codes, words, (codes, words))


def unpacks(words: Tensor, bits: int, codes: Tensor) -> bool:
    """Unpack by the program; arguments and result as those of `packs`."""
    return bits == BITS and _run("unpack", codes, words, (words, codes))


def _run(function: str, codes: Tensor, words: Tensor, places: tuple[Tensor, Tensor]) -> bool:
    order = "rows" if words.is_contiguous() else "columns" if words.t().is_contiguous() else None
    usable = order is not None and can_read(codes, words if order == "rows" else words.t())
    program = _program() if usable else None
    if program is None:
        return False
    sizes = map(ctypes.c_int64, words.shape)
    ask = getattr(program, f"auto_round_{function}_{order}")
    ask(*addresses(*places), *sizes, threads_for(codes.numel()))
    return True


def _program() -> ctypes.CDLL | None:
    """The compiled program; None where it cannot be made."""
    return numeric_library(SOURCE, (), "4-bit codes are packed without a compiled program")
