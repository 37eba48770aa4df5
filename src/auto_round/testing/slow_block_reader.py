"""A second reader of GGUF blocks, weight by weight, written from the description of the blocks alone.

It shares no code with `auto_round.layouts.gguf`. Source of the offsets: llama.cpp `ggml-common.h`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor

Parts = tuple[float, int, int, float, int]
"""Of one weight: shared number, multiple, number of the grid, shared minimum, multiple of it (subtracted)."""


def _half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def _small(block: bytes, i: int, head: int, *, fifth: bool) -> int:
    """Number of a block of 32: `head` bytes of scales, five bits perhaps, then nibbles."""
    high = 0
    if fifth:
        high = (struct.unpack_from("<I", block, head)[0] >> i & 1) << 4
        head += 4
    return block[head + i % 16] >> 4 * (i // 16) & 15 | high


def _pair(block: bytes, i: int, at: int) -> int:
    """Two bits of a block of 256."""
    return block[at + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3


def _nibble(block: bytes, i: int, at: int) -> int:
    """Four bits of a block of 256 in runs of 64."""
    return block[at + 32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15


def _six(block: bytes, j: int, at: int) -> tuple[int, int]:
    """Scale and minimum `j` of eight in 12 bytes."""
    b = block[at : at + 12]
    if j < 4:
        return b[j] & 63, b[j + 4] & 63
    return b[j + 4] & 15 | b[j - 4] >> 6 << 4, b[j + 4] >> 4 | b[j] >> 6 << 4


def _q2_k(b: bytes, i: int) -> Parts:
    s = b[i // 16]
    return _half(b, 80), s & 15, _pair(b, i, 16), _half(b, 82), s >> 4


def _q3_k(b: bytes, i: int) -> Parts:
    j = i // 16
    low, high = b[96 + j % 8] >> 4 * (j // 8) & 15, b[104 + j % 4] >> 2 * (j // 4) & 3
    n = _pair(b, i, 32) + 4 * (b[i % 32] >> i // 32 & 1) - 4
    return _half(b, 108), (low | high << 4) - 32, n, 0.0, 0


def _q4_k(b: bytes, i: int) -> Parts:
    sc, mn = _six(b, i // 32, 4)
    return _half(b, 0), sc, _nibble(b, i, 16), _half(b, 2), mn


def _q5_k(b: bytes, i: int) -> Parts:
    sc, mn = _six(b, i // 32, 4)
    n = _nibble(b, i, 48) | (b[16 + i % 32] >> i // 32 & 1) << 4
    return _half(b, 0), sc, n, _half(b, 2), mn


def _q6_k(b: bytes, i: int) -> Parts:
    low = b[64 * (i // 128) + i % 64] >> 4 * (i % 128 // 64) & 15
    sc = struct.unpack_from("<b", b, 192 + i // 16)[0]
    return _half(b, 208), sc, (low | _pair(b, i, 128) << 4) - 32, 0.0, 0


_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
"""Magnitudes of FP4 codes, twice."""


def _mxfp4(b: bytes, i: int) -> Parts:
    code = _small(b, i, 1, fifth=False)
    step = math.nan if b[0] == 255 else 2.0 ** (b[0] - 128)
    return step, 1, -_DOUBLED[code & 7] if code & 8 else _DOUBLED[code], 0.0, 0


def _nvfp4(b: bytes, i: int) -> Parts:
    """Four groups of 16: a number of 4 bits exponent and 3 bits mantissa each, then 8 bytes of codes each."""
    e, m = b[i // 16] >> 3, b[i // 16] & 7
    step = m * 2.0**-10 if e == 0 else (8 + m) * 2.0 ** (e - 11)
    code = b[4 + 8 * (i // 16) + i % 8] >> 4 * (i % 16 // 8) & 15
    return step, 1, -_DOUBLED[code & 7] if code & 8 else _DOUBLED[code], 0.0, 0


READERS: dict[str, tuple[int, int, Callable[[bytes, int], Parts]]] = {
    "q4_0": (32, 18, lambda b, i: (_half(b, 0), 1, _small(b, i, 2, fifth=False) - 8, 0.0, 0)),
    "q4_1": (32, 20, lambda b, i: (_half(b, 0), 1, _small(b, i, 4, fifth=False), _half(b, 2), -1)),
    "q5_0": (32, 22, lambda b, i: (_half(b, 0), 1, _small(b, i, 2, fifth=True) - 16, 0.0, 0)),
    "q5_1": (32, 24, lambda b, i: (_half(b, 0), 1, _small(b, i, 4, fifth=True), _half(b, 2), -1)),
    "q8_0": (32, 34, lambda b, i: (_half(b, 0), 1, struct.unpack_from("<b", b, 2 + i)[0], 0.0, 0)),
    "q2_k": (256, 84, _q2_k),
    "q3_k": (256, 110, _q3_k),
    "q4_k": (256, 144, _q4_k),
    "q5_k": (256, 176, _q5_k),
    "q6_k": (256, 210, _q6_k),
    "mxfp4": (32, 17, _mxfp4),
    "nvfp4": (64, 36, _nvfp4),
}
"""Type -> weights in a block, bytes of a block, and what one weight is made of."""


def read_blocks(name: str, octets: Tensor) -> Tensor:
    """Weights `[out, in]` float32 of rows of blocks `[out, bytes]` uint8.

    Every product and the difference are rounded to float32.
    """
    weights, size, read = READERS[name]
    rows = []
    for row in octets.tolist():
        blocks = [bytes(row[at : at + size]) for at in range(0, len(row), size)]
        rows.append([read(block, i) for block in blocks for i in range(weights)])
    d, sc, n, dmin, mn = (torch.tensor(part, dtype=torch.float32) for part in _columns(rows))
    return d * sc * n - dmin * mn


def _columns(rows: list[list[Parts]]) -> list[list[list[float]]]:
    return [[[weight[k] for weight in row] for row in rows] for k in range(5)]
