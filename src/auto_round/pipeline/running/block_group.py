"""Neighbouring blocks run, and tuned, as one module."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.facts.flow import Flow, States
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.tuning.samples import Arguments, states_of


class BlockGroup(nn.Module):
    """One or several blocks in a row; parameter names are `<position>.<name in the block>`.

    A block that the model skips passes its input on; what the model adds between blocks is added here.

    Attributes:
        flowing: how many of the `States` flow; those behind are handed on beside them.
    """

    def __init__(self, blocks: Sequence[nn.Module], flows: Sequence[Flow]) -> None:
        """Put blocks together.

        Args:
            blocks: in the order in which they run.
            flows: what each of them takes and returns.
        """
        super().__init__()
        self._orders = tuple(flow.order for flow in flows)
        self.flowing = len(self._orders[0])
        for position, block in enumerate(blocks):
            self.add_module(str(position), block)

    def forward(self, *inputs: Any) -> States:
        """Run the blocks in turn.

        Args:
            inputs: what flows in, each `[batch, length, width]`, what is handed on beside it, and behind
                them a list with, for each block, its arguments (None: skipped) and what is added to what
                flows into it.
        """
        *states, calls = inputs
        for block, order, (call, added) in zip(self.children(), self._orders, calls, strict=True):
            flowing = [s if a is None else s + a.to(s.dtype) for s, a in zip(states, added, strict=False)]
            states = [*flowing, *states[len(added) :]]
            if call is not None:
                whole, states = states, _cut(states, call.lengths)
                args, kwargs = call.given(states)
                output = block(*args, **kwargs)
                flowing = _filled(call.kept(_handed_on(output, order, states)), whole)
                states = [*flowing, *call.carried_on(kwargs, output, states)]
        return tuple(states)


class GroupArguments:
    """Arguments of a group's blocks for chosen rows of a stream, looked up in the table.

    Attributes:
        last: rows of the table in the last call.
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

    @property
    def kind(self) -> Callable[[int], Hashable] | None:
        """Kind of a sample: those of one go through the blocks together; None where all do."""
        return self._kind if self._table.apart else None

    def _kind(self, sample: int) -> Hashable:
        return self._table.kind(self._first + sample)

    def __call__(self, index: Sequence[int]) -> Arguments:
        """Arguments of the group for the given samples."""
        rows = tuple(self._first + int(i) for i in index)
        self.last = list(rows)
        if self._last is None or self._last[0] != rows:
            calls = [self._table.batch(b, rows, self._device) for b in self._blocks]
            self._last = (rows, ((calls,), {}))
        return self._last[1]


def _cut(states: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """The part of each tensor that a block is given; all of it where no lengths are known."""
    if not lengths:
        return list(states)
    return [state[:, :length] for state, length in zip(states, lengths, strict=True)]


def _filled(states: States, whole: Sequence[Tensor]) -> list[Tensor]:
    """What a block gave, with zeros behind it where it was given only a part of `whole`."""
    missing = [full.shape[1] - state.shape[1] for state, full in zip(states, whole, strict=False)]
    pairs = zip(states, missing, strict=True)
    return [nn.functional.pad(state, (0, 0, 0, n)) if n else state for state, n in pairs]


def _handed_on(output: Any, order: Sequence[int], states: Sequence[Tensor]) -> States:
    """What flows on; a tensor that the block gives up, with None in its place, stays as it was."""
    if isinstance(output, tuple) and len(order) > 1:
        known = dict(zip(order, states, strict=True))
        output = tuple(known.get(i) if part is None else part for i, part in enumerate(output))
    return states_of(output, order)
