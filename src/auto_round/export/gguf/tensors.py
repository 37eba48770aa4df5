"""Tensors of a GGUF file and where each of their rows comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class RowOrder(Protocol):
    """Which rows of a stored matrix come in which order; hashable."""

    def indices(self, rows: int) -> Tensor:
        """Row numbers of a source of `rows` rows, int64, in the order of the file; all of them or some."""
        ...


@dataclass(frozen=True, slots=True)
class RotaryPairs:
    """Halves of each head interleaved: Transformers rotates element i with i + d/2, llama.cpp neighbours.

    Attributes:
        heads: heads of the matrix.
    """

    heads: int

    def indices(self, rows: int) -> Tensor:
        """See `RowOrder`."""
        numbers = torch.arange(rows, device="cpu")
        return numbers.reshape(self.heads, 2, rows // self.heads // 2).transpose(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class Listed:
    """Any order of rows, given row by row.

    Attributes:
        numbers: rows of the source.
    """

    numbers: tuple[int, ...]

    def indices(self, rows: int) -> Tensor:
        """See `RowOrder`."""
        return torch.tensor(self.numbers, dtype=torch.int64, device="cpu")


@dataclass(frozen=True, slots=True)
class GroupsApart:
    """Falcon's groups of queries, one key and one value -> all queries, all keys, all values.

    Attributes:
        heads: query heads.
        groups: key heads.
    """

    heads: int
    groups: int

    def indices(self, rows: int) -> Tensor:
        """See `RowOrder`."""
        size = rows // (self.heads + 2 * self.groups)
        numbers = torch.arange(rows, device="cpu").reshape(self.groups, self.heads // self.groups + 2, size)
        return torch.cat(
            [numbers[:, :-2].reshape(-1), numbers[:, -2].reshape(-1), numbers[:, -1].reshape(-1)]
        )


class Change(Enum):
    """What happens to the numbers on their way into the file, beside a change of order."""

    NONE = "none"
    PLUS_ONE = "1 is added (Gemma multiplies by 1 + weight, llama.cpp by the weight)"
    TRANSPOSED = "rows become columns (GPT-2 stores [in, out])"
    SCALE = "a number of each matrix that its blocks are multiplied by (NVFP4)"


@dataclass(frozen=True, slots=True)
class TensorRows:
    """Rows of a file's tensor that come from one tensor of the source.

    Attributes:
        source: name of the tensor in the source.
        start: first row, counted over all leading dimensions of the file's tensor.
        rows: number of rows.
        order: order of the source's rows; None for their own.
    """

    source: str
    start: int
    rows: int
    order: RowOrder | None = None

    def arrange(self, rows: Tensor) -> Tensor:
        """Rows of the source `[rows, ...]` in the order of the file."""
        return rows if self.order is None else rows[self.order.indices(rows.shape[0])]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: in the file, for example `blk.0.attn_q.weight`.
        shape: `[..., out, in]`, as torch counts; the file lists it reversed.
        pieces: where its rows come from, in order; empty for a constant and for what a template gives.
        change: what else happens to its numbers.
        values: values of a constant, float32; empty otherwise.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[TensorRows, ...]
    change: Change = Change.NONE
    values: tuple[float, ...] = ()

    @property
    def rows(self) -> int:
        """Rows over all leading dimensions; 1 for a vector."""
        return math.prod(self.shape[:-1])

    def prepare(self, piece: TensorRows, source: Tensor) -> Tensor:
        """The rows that a piece stands for, `[rows, in]` or, for a vector, `[rows]`.

        Args:
            piece: one of `pieces`.
            source: the tensor that it names, in any float dtype.
        """
        if self.change is Change.TRANSPOSED:
            source = source.T
        if self.change is Change.PLUS_ONE:
            source = source.float() + 1
        rows = source.reshape(-1, source.shape[-1]) if source.dim() > 1 else source
        return piece.arrange(rows)

    def restore(self, piece: TensorRows, rows: Tensor) -> Tensor:
        """The inverse of `prepare`.

        Args:
            piece: one of `pieces`.
            rows: its rows in the order of the file, `[rows, in]`; `[1, n]` for a vector.

        Returns:
            The tensor of the source, `[rows, in]` or `[in, rows]`; `[n]` for a vector.
        """
        part = rows[0] if len(self.shape) == 1 else rows
        if piece.order is not None:
            back = torch.empty_like(part)
            back[piece.order.indices(len(part))] = part
            part = back
        if self.change is Change.PLUS_ONE:
            part = part - 1
        return part.T if self.change is Change.TRANSPOSED else part
