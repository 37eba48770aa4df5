"""Groups: which weights of a tensor share a scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.numerics.at_once import bands


@dataclass(frozen=True, slots=True)
class Group:
    """Cuts a weight `[..., out, in]` into groups: pieces of a row, or rectangles of several rows.

    Attributes:
        size: inputs in a group; -1 all of a row, 0 one group for the whole matrix. A size above the row's
            length means all of it. When the size does not divide the row, the last group is short.
        rows: outputs in a group; where they do not divide the matrix, the last groups have fewer.
    """

    size: int
    rows: int = 1

    def __post_init__(self) -> None:
        if self.size < -1:
            raise ConfigError(f"group_size must be -1 (row), 0 (tensor) or positive, got {self.size}")
        if self.rows < 1 or (self.size == 0 and self.rows != 1):
            raise ConfigError(f"rows of a group must be positive, and 1 for a whole tensor, got {self.rows}")

    def width(self, n_in: int) -> int:
        """Inputs in a full group of a row of `n_in`; for size 0 the row's own length."""
        return n_in if self.size <= 0 or self.size > n_in else self.size

    def count(self, n_in: int) -> int:
        """Groups in a row of `n_in` weights."""
        return -(-n_in // self.width(n_in))

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales of a weight of `shape`: `[..., rows, n_groups]`, `[..., 1, 1]` for size 0.

        `rows` is the number of outputs, or of bands of `self.rows` outputs.
        """
        if self.size == 0:
            return (*shape[:-2], 1, 1)
        return (*shape[:-2], -(-shape[-2] // self.rows), self.count(shape[-1]))

    def split(self, w: Tensor, pad: float = 0.0) -> Tensor:
        """View or copy as `[..., rows, n_groups, weights of a group]`; short groups are filled with `pad`."""
        if self.size == 0:
            return w.reshape(*w.shape[:-2], 1, 1, w.shape[-2] * w.shape[-1])
        n_out, n_in = w.shape[-2:]
        width, count = self.width(n_in), self.count(n_in)
        right, below = width * count - n_in, -n_out % self.rows
        if right or below:
            w = torch.nn.functional.pad(w, (0, right, 0, below) if below else (0, right), value=pad)
        if self.rows == 1:
            return w.reshape(*w.shape[:-1], count, width)
        tiles = w.reshape(*w.shape[:-2], -1, self.rows, count, width).transpose(-3, -2)
        return tiles.reshape(*tiles.shape[:-2], self.rows * width)

    def join(self, grouped: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of `split` for a weight of `shape`."""
        if self.size == 0:
            return grouped.reshape(*shape)
        if self.rows > 1:
            tiles = grouped.reshape(*grouped.shape[:-1], self.rows, -1).transpose(-3, -2)
            return tiles.reshape(*tiles.shape[:-4], -1, tiles.shape[-2] * tiles.shape[-1])[
                ..., : shape[-2], : shape[-1]
            ]
        flat = grouped.reshape(*grouped.shape[:-2], grouped.shape[-2] * grouped.shape[-1])
        return flat[..., : shape[-1]]

    def spread(self, per_group: Tensor, shape: Sequence[int]) -> Tensor:
        """Value of each weight's own group: `[..., rows, n_groups]` -> `shape` `[..., out, in]`."""
        if self.size == 0:
            return per_group.expand(*shape)
        each = per_group.repeat_interleave(self.width(shape[-1]), -1).repeat_interleave(self.rows, -2)
        return each[..., : shape[-2], : shape[-1]]

    def spread_by_input(self, per_group: Tensor, shape: Sequence[int]) -> Tensor:
        """`spread` of a matrix, transposed: `[rows, n_groups]` -> `[in, out]`.

        Only the few numbers of groups are transposed; each input's are then neighbours that are copied.
        """
        if self.size == 0:
            return per_group.expand(shape[1], shape[0])
        by_row = per_group.T.contiguous().repeat_interleave(self.rows, -1)[:, : shape[0]]
        return by_row.repeat_interleave(self.width(shape[1]), 0)[: shape[1]]

    def bands(self, shape: Sequence[int], weights: int) -> Iterator[tuple[slice, slice]]:
        """Cuts a matrix `shape` into bands of rows of about so many weights; groups stay whole.

        Yields:
            Rows of the weight and rows of its scales; of several matrices those in a band, and one band of
            everything where one group is the whole matrix.
        """
        if len(shape) > 2:
            yield from ((band, band) for band in bands(shape[0], math.prod(shape[1:]), weights))
            return
        if self.size == 0 or len(shape) != 2:
            yield slice(None), slice(None)
            return
        for band in bands(shape[0], shape[1], weights, self.rows):
            yield band, self.scale_rows(band)

    def scale_rows(self, rows: slice) -> slice:
        """Rows of the scales that belong to some rows of a weight.

        Raises:
            UnsupportedError: the rows begin in the middle of a group, or are not neighbours.
        """
        if self.size == 0 or rows == slice(None):
            return slice(None)  # one scale for a whole matrix holds for each of its parts too
        if self.rows == 1:
            return rows
        if rows.start % self.rows or rows.step not in (None, 1):
            raise UnsupportedError(
                f"rows {rows.start} to {rows.stop} cannot be taken from a weight",
                [Refusal("groups", f"{self.rows} rows share a scale, and these lie in groups with others")],
            )
        return slice(rows.start // self.rows, -(-rows.stop // self.rows))
