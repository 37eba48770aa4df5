"""The trace of calibration rows: the arguments of every block, and the streams before the first block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from auto_round.calibration.row import CalibrationRow, joined, masks_of
from auto_round.facts.flow import States
from auto_round.models.source import CPU, Stem, Trace
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.running.block_arguments import ArgumentPlace, ArgumentTable, batch_axes
from auto_round.pipeline.running.streams import Streams, home_of_streams


def trace_rows(
    job: Job,
    scratch: Path,
    embedding: Tensor | None = None,
    ended: Sequence[Streams] = (),
    towers: Mapping[str, Tensor] | None = None,
) -> tuple[ArgumentTable, Streams]:
    """Run the model's stem (all but its blocks) on every row.

    Args:
        job: the run; it has rows.
        scratch: folder for streams that are too large for memory.
        embedding: the token embedding as the output stores it, where the quantized stream begins; None for
            the model's own.
        ended: streams behind the lists of blocks before; as many as there are of them.
        towers: parameter -> its rounded weight, where towers are quantized: both streams begin behind them.

    Returns:
        Arguments of every block of a list for every row, and the streams at its first block.
    """
    rows = job.all_rows
    begun: list[States] = []
    rounded: list[States] = []
    pictured = any(row.beside_text for row in rows)
    with job.source.stem(CPU, job.dtype, head=False, towers=pictured, replaced=towers) as stem:
        if pictured:
            stem.refuse_more_at_the_end(next(row.inputs for row in rows if row.beside_text))
        table = ArgumentTable(_axes(stem, rows, ended), apart=pictured)
        for i, row in enumerate(rows):
            reference, quantized = _ends(ended, i)
            traced = stem.trace(row.inputs, reference)
            table.add(traced.calls, traced.edits)
            begun.append(_states(job, traced))
            if embedding is not None or ended:
                with nullcontext() if embedding is None else stem.embedding(embedding):
                    rounded.append(_states(job, stem.trace(row.inputs, quantized)))
    size = 3 * sum(state.numel() * state.element_size() for states in begun for state in states)
    home = home_of_streams(job.level, job.memory, job.device, size, _beside(job))
    masks = masks_of(rows)
    if masks is not None and masks.shape[1] != begun[0][0].shape[1]:
        masks = None  # what flows here does not stand at the rows' positions
    spill = scratch / f"list-{len(ended)}" if home.files else None
    streams = Streams.begin(begun, job.tuned, device=home.device, masks=masks, spill=spill)
    for i, states in enumerate(rounded):
        streams.restart(i, states)
    return table, streams


def _beside(job: Job) -> int:
    """Host memory that the run will need beside the streams, bytes."""
    return 0 if job.memory_plan is None else job.memory_plan.beside_streams


def _states(job: Job, traced: Trace) -> States:
    """What flows into the first block, in the dtype of the run; what is handed on beside it as it is."""
    flowing = (state.detach().to(job.dtype) for state in traced.states[: traced.flowing])
    return (*flowing, *traced.beside)


def _ends(ended: Sequence[Streams], row: int) -> tuple[list[States], list[States]]:
    """What flows out of the lists before for one row: in the unquantized and in the quantized model."""
    pairs = [streams.row(row) for streams in ended]
    reference, quantized = ([tuple(s.to(CPU) for s in pair[which]) for pair in pairs] for which in (0, 1))
    return reference, quantized


def _axes(
    stem: Stem, rows: Sequence[CalibrationRow], ended: Sequence[Streams]
) -> Mapping[ArgumentPlace, int]:
    """How the blocks' arguments grow with the batch, by the same row once and twice.

    One with images is taken where there is one, and a padded one.
    """
    number, row = max(enumerate(rows), key=lambda e: (bool(e[1].beside_text), e[1].mask is not None, -e[0]))
    ends, _ = _ends(ended, number)
    repeated = ([tuple(torch.cat([s] * n) for s in states) for states in ends] for n in (1, 2))
    one, two = (stem.trace(joined([row] * n), end).calls for n, end in zip((1, 2), repeated, strict=True))
    return batch_axes(one, two)
