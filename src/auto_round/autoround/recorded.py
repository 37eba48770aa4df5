"""Recorded calls of one block, as forward hooks leave them, brought into tensors of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import ConfigError
from auto_round.facts.flow import BlockCall, Flow, States, split_call
from auto_round.models.families import flow_of, parameter_names
from auto_round.pipeline.running.block_arguments import ArgumentTable


@dataclass(frozen=True, slots=True)
class Recorded:
    """Recorded calls of one block.

    Attributes:
        states: what flowed in, each `[samples, length, width]`.
        calls: further arguments of each sample.
        flow: which parameters of the block receive the states.
    """

    states: States
    calls: Sequence[BlockCall]
    flow: Flow

    def __len__(self) -> int:
        return len(self.calls)

    def table(self, order: Sequence[int]) -> ArgumentTable:
        """Further arguments of some samples, as block 0."""
        table = ArgumentTable()
        for sample in order:
            table.add([self.calls[sample]], [(None,) * len(self.states)])
        return table


def record(block: nn.Module, inputs: Sequence[Any] | Tensor) -> Recorded:
    """Bring recorded calls together.

    Args:
        block: whose calls they are.
        inputs: `(args, kwargs)` of each call, or `((args, kwargs), ...)`, or hidden states alone.

    Raises:
        ConfigError: nothing recorded, something else, or hidden states of different shapes.
    """
    flow, names = flow_of(block), parameter_names(block)
    entries = [_read(entry, flow, names) for entry in ([inputs] if isinstance(inputs, Tensor) else inputs)]
    if not entries:
        raise ConfigError("quantize_block needs at least one recorded call")
    calls: list[BlockCall] = []
    for states, call in entries:
        count = int(states[0].shape[0])
        calls += [_row(call, row, count) for row in range(count)]
    return Recorded(stack([states for states, _ in entries]), calls, flow)


def stack(parts: Sequence[Tensor | States] | Tensor) -> States:
    """Join what flows in along the samples.

    Raises:
        ConfigError: calls have tensors of different shapes, or not equally many.
    """
    entries = [parts] if isinstance(parts, Tensor) else parts
    rows = [(entry,) if isinstance(entry, Tensor) else tuple(entry) for entry in entries]
    shapes = {tuple(tuple(part.shape[1:]) for part in row) for row in rows}
    if len(shapes) != 1:
        raise ConfigError(f"hidden states of all calls must have one shape, got {sorted(shapes)}")
    return tuple(torch.cat([part.detach() for part in column]) for column in zip(*rows, strict=True))


def _read(entry: Any, flow: Flow, names: Sequence[str]) -> tuple[States, BlockCall]:
    whole = isinstance(entry, (tuple, list)) and len(entry) and _is_call(entry[0])
    call = ((entry,), {}) if isinstance(entry, Tensor) else entry[0] if whole else entry
    if _is_call(call):
        try:
            states, rest = split_call(flow.taken, names, *call)
        except LookupError:
            states, rest = (), BlockCall((), {})
        if states and all(isinstance(state, Tensor) for state in states):
            return states, rest
    raise ConfigError(
        "a recorded call is (args, kwargs) or ((args, kwargs), ...), with "
        f"{' and '.join(flow.taken)} among them; or hidden states alone"
    )


def _is_call(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and isinstance(value[0], (tuple, list)) and isinstance(value[1], Mapping)


def _row(call: BlockCall, row: int, count: int) -> BlockCall:
    """Cut one sample out of the arguments of a batch."""
    args = tuple(_cut(value, row, count) for value in call.args)
    return replace(call, args=args, kwargs={name: _cut(v, row, count) for name, v in call.kwargs.items()})


def _cut(value: Any, row: int, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.dim() > 0 and value.shape[0] == count else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(part, row, count) for part in value)
    return value
