"""Tile sizes of the Triton programs by shape class: a table, nothing is searched while a model runs.

`benchmarks/gpu_linear.py --tune` measures the candidates on a GPU and prints rows for these tables. The
rows below were reasoned, not measured: enough programs to fill 132 multiprocessors, at least 32 KiB of
loads in flight on each (what 4.8 TB/s times 0.7 microseconds asks of an H200), tiles whose float32 sums
stay in registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Tile:
    """How the work is cut.

    Attributes:
        rows: outputs of a program.
        columns: words of each row read at a time.
        tokens: tokens of a program; 1 where every program takes one token.
        warps: groups of 32 threads of a program.
        stages: loads in flight, in units of loop passes.
    """

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int


DECODE: tuple[tuple[int, Tile], ...] = (
    (2048, Tile(1, 512, 1, 4, 1)),
    (8192, Tile(2, 512, 1, 4, 1)),
    (1 << 62, Tile(4, 512, 1, 4, 1)),
)
"""Outputs up to which a tile is used -> tile of `one_token`."""

DECODE_TOKENS = 1
"""Tokens up to which `one_token` is used; it reads the weight once a token."""

PREFILL: tuple[tuple[int, Tile], ...] = (
    (16, Tile(64, 32, 16, 4, 3)),
    (32, Tile(64, 32, 32, 4, 3)),
    (1 << 62, Tile(128, 32, 64, 8, 2)),
)
"""Tokens up to which a tile is used -> tile of `several_tokens`."""

FUSED_TOKENS = 128
"""Tokens up to which `several_tokens` is used: it unpacks the weight again for every
tile of tokens, while writing the unpacked weight once costs as much memory traffic as a bfloat16 product of
few tokens in all."""

UNPACK = Tile(8, 128, 1, 4, 1)
"""Tile of `unpacked`."""

DENSE_BAND = 1 << 24
"""Weights unpacked at a time: 32 MiB, so that they are still in the second-level cache
(50 MiB) when multiplied."""

DENSE_ROWS = 128
"""Bands have a multiple of so many rows: the tiles of cuBLAS, and 16-byte addresses in the result."""

WAVES = 2
"""Programs wanted for each multiprocessor; fewer are split along the inputs."""

SPLITS = 8
"""Shares into which inputs are split at most."""


def decode_tile(n_out: int, n_words: int) -> Tile:
    """Tile of `one_token`."""
    tile = next(tile for most, tile in DECODE if n_out <= most)
    columns = max(32, min(tile.columns, power_above(n_words)))
    return Tile(tile.rows, columns, 1, max(1, min(tile.warps, columns // 32)), tile.stages)


def prefill_tile(n_tokens: int, per_word: int, shared: int) -> Tile:
    """Tile of `several_tokens`, with as many loads in flight as there is room for.

    Args:
        n_tokens: tokens of the call.
        per_word: codes of a word.
        shared: shared memory that a program may take, bytes: 227 KiB on an H100, 99 KiB on an RTX 4090.
    """
    tile = next(tile for most, tile in PREFILL if n_tokens <= most)
    fitting = (replace(tile, stages=n) for n in range(tile.stages, 1, -1))
    return next((t for t in fitting if shared_bytes(t, per_word) <= shared), replace(tile, stages=1))


def shared_bytes(tile: Tile, per_word: int) -> int:
    """Most shared memory that `several_tokens` takes, bytes.

    The activations of each field in every pass in flight, and the words and 16-bit steps of all but the one
    that is worked on. Compiled by Triton 3.6 for compute capability 9.0 it is that or 4 KiB less.
    """
    activations = per_word * tile.columns * tile.tokens * 2
    return tile.stages * activations + (tile.stages - 1) * tile.rows * tile.columns * 6


def splits(programs: int, passes: int, processors: int) -> int:
    """Shares of the inputs: enough programs for every multiprocessor, at least two passes for each.

    Args:
        programs: programs without a split.
        passes: loop passes of one program without a split.
        processors: multiprocessors of the device.
    """
    wanted = -(-WAVES * processors // max(1, programs))
    return max(1, min(wanted, passes // 2, SPLITS))


def power_above(n: int) -> int:
    """Smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
