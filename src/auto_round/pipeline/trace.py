"""The beginning of every calibrated run: what each block receives, and the streams before the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from auto_round.calibration.row import CalibrationRow, joined, masks_of
from auto_round.facts.flow import States
from auto_round.models.source import CPU, Stem, Trace
from auto_round.pipeline.arguments import ArgumentTable, Place, batch_axes
from auto_round.pipeline.job import Job
from auto_round.pipeline.streams import Streams, home_of_streams


def trace_rows(job: Job, scratch: Path, embedding: Tensor | None = None) -> tuple[ArgumentTable, Streams]:
    """Run the model's stem over all rows.

    Args:
        job: the run; it has rows.
        scratch: folder for streams that are too large for memory.
        embedding: the token embedding as the output stores it, where the quantized stream begins; None for
            the model's own.

    Returns:
        Arguments of every block for every row, and the streams at the first block.
    """
    rows = () if job.rows is None else job.rows.rows
    begun: list[States] = []
    rounded: list[States] = []
    with job.source.stem(CPU, job.dtype, head=False) as stem:
        table = ArgumentTable(_axes(stem, rows))
        for row in rows:
            traced = stem.trace(row.inputs)
            table.add(traced.calls, traced.edits)
            begun.append(_states(job, traced))
            if embedding is not None:
                with stem.embedding(embedding):
                    rounded.append(_states(job, stem.trace(row.inputs)))
    size = 2 * sum(state.numel() * state.element_size() for states in begun for state in states)
    home = home_of_streams(job.options.memory, job.device, size)
    spill = scratch if home.files else None
    streams = Streams.begin(begun, job.tuned, device=home.device, masks=masks_of(rows), spill=spill)
    for i, states in enumerate(rounded):
        streams.restart(i, states)
    return table, streams


def _states(job: Job, traced: Trace) -> States:
    return tuple(state.detach().to(job.dtype) for state in traced.states)


def _axes(stem: Stem, rows: Sequence[CalibrationRow]) -> Mapping[Place, int]:
    """How the blocks' arguments grow with the batch: the same row once and twice, a padded one if any is."""
    row = next((row for row in rows if row.mask is not None), rows[0])
    return batch_axes(*(stem.trace(joined([row] * n)).calls for n in (1, 2)))
