"""Groups of blocks tuned with as much memory as there is: where it ends, one step lower."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from auto_round.errors import is_out_of_memory
from auto_round.log import logger
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.machine.memory import release_freed_memory
from auto_round.pipeline.running.ahead import Ahead
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.streams import Streams, home_of_streams
from auto_round.pipeline.running.tune_group import GroupResult, GroupTuning, tune_group
from auto_round.pipeline.running.unit import ALL_TO_DO


class Fitting:
    """The level at which groups are tuned; it stays low once memory has ended."""

    def __init__(self, job: Job, scratch: Path, ahead: Ahead | None = None) -> None:
        """Begin as planned.

        Args:
            job: the run.
            scratch: folder for hidden states that go to files.
            ahead: computes targets ahead, as long as there is memory for them; None for not at all.
        """
        self._job, self._scratch, self._ahead = job, scratch, ahead
        self._first, *self._left = job.levels
        self._level = self._first

    @property
    def lowered(self) -> str:
        """How groups are tuned since memory ended, for people; empty while the run goes as planned."""
        return "" if self._level is self._first else self._level.text

    def tune(
        self,
        indices: Sequence[int],
        table: ArgumentTable,
        streams: Streams,
        how: GroupTuning,
        following: Sequence[int] = (),
    ) -> GroupResult:
        """`tune_group`, tried again one level lower as often as memory ends and a level is left.

        Args:
            indices: blocks of the group.
            table: see `tune_group`.
            streams: see `tune_group`.
            how: see `tune_group`.
            following: blocks of the next group in its list; none behind the last.

        Raises:
            Exception: what `tune_group` raises; the end of memory too, at the last level, once the quantized
                stream has begun to move, or where other processes wait for the block.
        """
        while True:
            try:
                turn = ALL_TO_DO
                if self._ahead is not None:
                    turn = self._ahead.turn(following, table, streams)
                return tune_group(self._at_level(), indices, table, streams, self._how(how), turn)
            except Exception as error:
                again = self._left and streams.between and self._job.ranks.size == 1
                if not (again and is_out_of_memory(error)):
                    raise
            # Behind the handler: the error held all that the attempt had in memory.
            if self._ahead is not None:
                self._ahead.stop()
            self._step_down(self._job.source.blocks[indices[0]].disk, streams)

    def _at_level(self) -> Job:
        """The job with as many rows at once as the level allows, never more than it began with."""
        tune, rows = self._job.tune, self._level.rows
        if not rows or (tune.rows_at_once and rows >= tune.rows_at_once):
            return self._job
        return replace(self._job, tune=replace(tune, rows_at_once=rows))

    def _how(self, how: GroupTuning) -> GroupTuning:
        return replace(how, objective=replace(how.objective, rounds_again=self._level.rounds_again))

    def _step_down(self, unit: str, streams: Streams) -> None:
        before, self._level = self._level, self._left.pop(0)
        logger.warning("memory ended while %s was tuned; it is tried again with %s", unit, self._level.text)
        if before.streams is not self._level.streams:
            size = 3 * sum(state.nbytes for state in streams.reference)
            home = home_of_streams(self._level, self._job.memory, self._job.device, size)
            streams.move(home, self._scratch / "lowered")
        gc.collect()
        release_freed_memory()
        if self._job.device.type != "cpu":
            torch.accelerator.empty_cache()
