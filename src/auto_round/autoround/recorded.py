"""Recorded calls of one block, as forward hooks leave them, brought into one tensor of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import ConfigError
from auto_round.models.source import BlockCall
from auto_round.pipeline.arguments import ArgumentTable
from auto_round.tuning.samples import BlockCall as Arguments


@dataclass(frozen=True, slots=True)
class Recorded:
    """Recorded calls of one block.

    Attributes:
        hidden: `[samples, length, hidden]`.
        table: further arguments by sample.
    """

    hidden: Tensor
    table: ArgumentTable

    def __len__(self) -> int:
        return int(self.hidden.shape[0])

    def arguments(self, index: Sequence[int], device: torch.device) -> Arguments:
        """Further arguments of some samples in one call."""
        call, _ = self.table.batch(0, index, device)
        return ((), {}) if call is None else (call.args, call.kwargs)


def record(inputs: Sequence[Any] | Tensor) -> Recorded:
    """Bring recorded calls together.

    Args:
        inputs: `(args, kwargs)` of each call, or `((args, kwargs), ...)`, or hidden states alone.

    Raises:
        ConfigError: nothing recorded, something else, or hidden states of different shapes.
    """
    calls = [_read(entry) for entry in ([inputs] if isinstance(inputs, Tensor) else inputs)]
    if not calls:
        raise ConfigError("quantize_block needs at least one recorded call")
    table = ArgumentTable()
    for hidden, call in calls:
        count = int(hidden.shape[0])
        for row in range(count):
            table.add([_row(call, row, count)], [None])
    return Recorded(stack([hidden for hidden, _ in calls]), table)


def stack(parts: Sequence[Tensor] | Tensor) -> Tensor:
    """Join hidden states along the samples.

    Raises:
        ConfigError: they have different shapes.
    """
    if isinstance(parts, Tensor):
        return parts.detach()
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) != 1:
        raise ConfigError(f"hidden states of all calls must have one shape, got {sorted(shapes)}")
    return torch.cat([part.detach() for part in parts])


def _read(entry: Any) -> tuple[Tensor, BlockCall]:
    if isinstance(entry, Tensor):
        return entry, BlockCall((), {})
    if _is_call(entry) or (isinstance(entry, (tuple, list)) and entry and _is_call(entry[0])):
        args, kwargs = entry if _is_call(entry) else entry[0]
        args, kwargs = tuple(args), dict(kwargs)
        if not args and "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"),)
        if args and isinstance(args[0], Tensor):
            return args[0], BlockCall(args[1:], kwargs)
    raise ConfigError(
        "a recorded call is (args, kwargs) or ((args, kwargs), ...), hidden states first; or these alone"
    )


def _is_call(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and isinstance(value[0], (tuple, list)) and isinstance(value[1], Mapping)


def _row(call: BlockCall, row: int, count: int) -> BlockCall:
    """Cut one sample out of the arguments of a batch."""
    args = tuple(_cut(value, row, count) for value in call.args)
    return BlockCall(args, {name: _cut(value, row, count) for name, value in call.kwargs.items()})


def _cut(value: Any, row: int, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.dim() > 0 and value.shape[0] == count else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(part, row, count) for part in value)
    return value
