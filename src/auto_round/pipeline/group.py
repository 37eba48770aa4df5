"""Neighbouring blocks run, and tuned, as one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from auto_round.models.source import BlockCall
from auto_round.pipeline.arguments import ArgumentTable
from auto_round.tuning.samples import BlockCall as Arguments
from auto_round.tuning.samples import first_output


class BlockGroup(nn.Module):
    """One or several blocks in a row; parameter names are `<position>.<name in the block>`.

    A block that the model skips passes its input on; what the model adds between blocks is added here.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        for position, block in enumerate(blocks):
            self.add_module(str(position), block)

    def forward(self, hidden: Tensor, calls: Sequence[tuple[BlockCall | None, Tensor | None]]) -> Tensor:
        """Run the blocks in turn.

        Args:
            hidden: `[batch, length, width]`.
            calls: for each block its arguments (None: skipped) and what is added to its input.
        """
        for block, (call, added) in zip(self.children(), calls, strict=True):
            if added is not None:
                hidden = hidden + added.to(hidden.dtype)
            if call is not None:
                hidden = first_output(block(hidden, *call.args, **call.kwargs))
        return hidden


class GroupArguments:
    """Looks up the arguments of a group for rows of a stream.

    Attributes:
        last: rows of the table that were asked for last.
    """

    def __init__(
        self, table: ArgumentTable, blocks: Sequence[int], device: torch.device, first_row: int = 0
    ) -> None:
        """Remember what to look up.

        Args:
            table: arguments of all rows.
            blocks: indices of the group's blocks.
            device: where tensors are wanted.
            first_row: row of the table that sample 0 is.
        """
        self._table, self._blocks, self._device, self._first = table, blocks, device, first_row
        self.last: list[int] = []
        self._last: tuple[tuple[int, ...], Arguments] | None = None

    def __call__(self, index: Sequence[int]) -> Arguments:
        """Arguments of the group for the given samples."""
        rows = tuple(self._first + int(i) for i in index)
        self.last = list(rows)
        if self._last is None or self._last[0] != rows:
            calls = [self._table.batch(b, rows, self._device) for b in self._blocks]
            self._last = (rows, ((calls,), {}))
        return self._last[1]
