"""The trace of one list of blocks: arguments of every block for every row, and the streams at its begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.diffusion.record import joined
from auto_round.diffusion.rows import RecordedRows
from auto_round.facts.flow import States
from auto_round.models.replay_stem import Replay
from auto_round.models.replayed_source import ReplayedSource
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.running.block_arguments import ArgumentPlace, ArgumentTable, batch_axes
from auto_round.pipeline.running.streams import Streams, home_of_streams, storage

Lengths = tuple[int, ...]
"""Length of each of the `States` of a row."""


def trace_list(
    job: Job, source: ReplayedSource, rows: RecordedRows, scratch: Path, ended: Sequence[ListStreams]
) -> tuple[ArgumentTable, ListStreams]:
    """Replay every row up to a list of blocks.

    Args:
        job: the run of the component.
        source: the component.
        rows: what it is called with; those to tune on first.
        scratch: folder for streams that are too large for memory.
        ended: the streams behind the lists before.

    Returns:
        Arguments of the blocks of the list, and the streams at its first block.
    """
    with source.replay(job.device, job.dtype) as replay:
        shapes = _shapes(replay, rows, ended)
        lengths = [tuple(shape[1] for shape in shapes[key]) for key in map(_key, _all(rows))]
        room = _room(shapes.values())
        ragged = len(set(lengths)) > 1
        streams = _streams(job, room, len(rows), scratch / f"list-{len(ended)}")
        table = ArgumentTable(_axes(replay, rows, ended), apart=ragged)
        for i, inputs in enumerate(_all(rows)):
            reference, quantized = (_ends(ended, i, which) for which in (0, 1))
            traced = replay.trace(inputs, reference)
            calls = [None if call is None else replace(call, lengths=lengths[i]) for call in traced.calls]
            table.add(calls if ragged else traced.calls, traced.edits)
            begun = replay.trace(inputs, quantized) if ended else traced
            for streams_of, states in ((streams.reference, traced.states), (streams.quantized, begun.states)):
                for to, state in zip(streams_of, states, strict=True):
                    to[i, : state.shape[1]] = state[0].to(to.device)
    return table, ListStreams(streams, lengths)


class ListStreams:
    """Streams at the begin or the end of a list of blocks, and how much of them belongs to each row."""

    def __init__(self, streams: Streams, lengths: Sequence[Lengths]) -> None:
        self.streams, self.lengths = streams, lengths

    def row(self, row: int, which: int) -> States:
        """What flows for one row, `[1, length, width]` each, in the unquantized (0) or quantized (1) one."""
        states = self.streams.row(row)[which]
        return tuple(s[:, :length] for s, length in zip(states, self.lengths[row], strict=True))


def outputs(
    job: Job, source: ReplayedSource, rows: RecordedRows, ended: Sequence[ListStreams], numbers: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What the component gives for some rows, unquantized and quantized, float32 on the host."""
    with source.replay(job.device, job.dtype) as replay:
        for i in numbers:
            inputs = rows.read(i)
            before, after = (replay.finish(inputs, _ends(ended, i, which)) for which in (0, 1))
            yield i, before, after


def _ends(ended: Sequence[ListStreams], row: int, which: int) -> list[States]:
    return [each.row(row, which) for each in ended]


def _all(rows: RecordedRows) -> Iterator[dict[str, Any]]:
    for i in range(len(rows)):
        yield rows.read(i)


def _key(inputs: Mapping[str, Any]) -> str:
    """Shapes of the arguments: rows of one key flow in the same shapes."""
    return str(_described(inputs))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape) if value.dtype is not torch.bool else [list(value.shape), int(value.sum())]
    if isinstance(value, Mapping):
        return [(key, _described(part)) for key, part in value.items()]
    if isinstance(value, tuple | list):
        return [_described(part) for part in value]
    return None if isinstance(value, float) else value


def _shapes(replay: Replay, rows: RecordedRows, ended: Sequence[ListStreams]) -> dict[str, list[torch.Size]]:
    """Shapes of what flows, for each kind of row."""
    found: dict[str, list[torch.Size]] = {}
    for i, inputs in enumerate(_all(rows)):
        key = _key(inputs)
        if key not in found:
            found[key] = [state.shape for state in replay.trace(inputs, _ends(ended, i, 0)).states]
    return found


def _room(shapes: Any) -> list[tuple[int, int]]:
    """Length and width of tensors that hold the states of any row."""
    columns = zip(*shapes, strict=True)
    return [(max(shape[1] for shape in column), column[0][2]) for column in columns]


def _streams(job: Job, room: Sequence[tuple[int, int]], count: int, spill: Path) -> Streams:
    size = 3 * count * job.dtype.itemsize * sum(length * width for length, width in room)
    home = home_of_streams(job.level, job.memory, job.device, size)
    folder = spill if home.files else None

    def make(name: str) -> States:
        made = tuple(
            storage((count, length, width), job.dtype, home.device, folder, f"{name}-{i}")
            for i, (length, width) in enumerate(room)
        )
        for state in made:
            state.zero_()  # what lies behind a shorter row is never looked at, but has to be a number
        return made

    return Streams(make("reference"), make("quantized"), make("targets"), job.tuned)


def _axes(replay: Replay, rows: RecordedRows, ended: Sequence[ListStreams]) -> Mapping[ArgumentPlace, int]:
    """How the blocks' arguments grow with the batch, by the first row once and twice."""
    inputs, ends = rows.read(0), _ends(ended, 0, 0)
    one = replay.trace(inputs, ends)
    two = replay.trace(joined([inputs] * 2), [tuple(torch.cat([s] * 2) for s in states) for states in ends])
    return batch_axes(one.calls, two.calls)
