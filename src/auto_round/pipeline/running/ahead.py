"""Targets computed ahead: what the next blocks should give does not depend on how these are tuned."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType

import torch

from auto_round.facts.flow import States
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.streams import Streams
from auto_round.pipeline.running.tune_group import opened_unit
from auto_round.pipeline.running.unit import Seen, Turn, references
from auto_round.ranks.ranks import ALONE


@dataclass(frozen=True, slots=True)
class _Pending:
    """A group whose targets are being computed.

    Attributes:
        targets: room that they fill.
        seen: what is measured meanwhile.
    """

    targets: States
    seen: Future[Seen]


class Ahead:
    """A thread that runs the next unquantized blocks while others are tuned; leaving the context ends it.

    It reads their weights itself, so that reading overlaps with tuning, too. It computes with as many threads
    as the run, on a device of the same kind, so that the bytes are the same with it and without.
    """

    def __init__(self, job: Job) -> None:
        """Begin with nothing ahead.

        Args:
            job: the run; `ahead` is the device, None for none.
        """
        at = job.ahead if job.ranks.size == 1 else None  # several processes run unquantized blocks together
        self._at = None if at is None else replace(job, device=at, placement=None)
        self._pool = ThreadPoolExecutor(1, "targets-ahead")
        self._pending: _Pending | None = None
        self._spare: States = ()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def turn(self, following: Sequence[int], table: ArgumentTable, streams: Streams) -> Turn:
        """What is known of a group when its turn comes, and what is to be begun once its targets are known.

        Args:
            following: the blocks after it in its list; none behind the last.
            table: arguments of all blocks of the list.
            streams: gets the targets of the group, where they are there.

        Raises:
            Exception: what went wrong while they were computed.
        """
        pending, self._pending = self._pending, None
        seen = None
        if pending is not None:
            seen = pending.seen.result()
            streams.targets, self._spare = pending.targets, streams.targets
        return Turn(seen, partial(self._begin, list(following), table, streams))

    def stop(self) -> None:
        """Compute nothing ahead from now on, and let go of what was: memory is short."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.seen.exception()  # waits; a failure shows again when the group is tuned
        self._at, self._spare = None, ()

    def _begin(self, following: Sequence[int], table: ArgumentTable, streams: Streams) -> None:
        if self._at is None or not following:
            return
        targets = self._spare or tuple(torch.empty_like(state) for state in streams.targets)
        there = Streams(streams.targets, (), targets, streams.tuned, streams.masks)
        self._spare = ()
        self._pending = _Pending(targets, self._pool.submit(_foresee, self._at, following, table, there))


def _foresee(job: Job, indices: Sequence[int], table: ArgumentTable, streams: Streams) -> Seen:
    """Run the unquantized blocks of a group, whose inputs are the reference; fills the targets."""
    with opened_unit(job, indices, table) as unit:
        return references(unit, streams, job.tune, ALONE)
