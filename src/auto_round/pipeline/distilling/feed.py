"""Rows as they flow into the first block, traced a few steps ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from auto_round.calibration.row import CalibrationRow
from auto_round.facts.flow import States
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.distilling.units import RowBatch
from auto_round.pipeline.fitting.states import AHEAD_BYTES
from auto_round.pipeline.fitting.work import row_bytes
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.streams import Streams
from auto_round.pipeline.running.trace_rows import trace_rows


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step, as they flow into the first block.

    Attributes:
        rows: what the blocks are called with for them.
        reference: what flows into the original model.
        quantized: what flows into the quantized one: another embedding may be stored.
    """

    rows: RowBatch
    reference: States
    quantized: States


class Feed:
    """The rows of each step."""

    def __init__(
        self,
        job: Job,
        rows: Sequence[CalibrationRow],
        order: Sequence[Sequence[int]],
        *,
        scratch: Path,
        embedding: Tensor | None,
    ) -> None:
        """Remember what to trace.

        Args:
            job: the run.
            rows: rows that block tuning did not see.
            order: which of them each step sees.
            scratch: folder for what does not fit into memory.
            embedding: as the output stores it; None for the model's own.
        """
        self._job, self._rows, self._order = job, rows, order
        self._scratch, self._embedding = scratch, embedding
        size = len(order[0]) * row_bytes(job.source, len(rows[0]), job.dtype)
        self._ahead = max(1, AHEAD_BYTES // size)
        self._from = -1
        self._traced: tuple[ArgumentTable, Streams] | None = None

    def batch(self, step: int) -> StepRows:
        """The rows of a step (from 0), traced with those of the next steps where they are not yet."""
        first = step - step % self._ahead
        if self._traced is None or self._from != first:
            members = [i for each in self._order[first : first + self._ahead] for i in each]
            rows = [self._rows[i] for i in members]
            self._traced = trace_some(self._job, rows, self._scratch, self._embedding)
            self._from = first
        count = len(self._order[0])
        return _part(*self._traced, (step - first) * count, count)


def trace_some(
    job: Job, rows: Sequence[CalibrationRow], scratch: Path, embedding: Tensor | None
) -> tuple[ArgumentTable, Streams]:
    """Trace some rows instead of those of the run."""
    return trace_rows(job.on_rows(rows), scratch, embedding)


def whole(table: ArgumentTable, streams: Streams) -> StepRows:
    """All rows that were traced."""
    return _part(table, streams, 0, streams.rows)


def _part(table: ArgumentTable, streams: Streams, first: int, count: int) -> StepRows:
    rows = slice(first, first + count)
    masks = None if streams.masks is None else streams.masks[rows]
    reference, quantized = (
        tuple(state[rows] for state in states) for states in (streams.reference, streams.quantized)
    )
    return StepRows(RowBatch(table, first, count, masks), reference, quantized)
