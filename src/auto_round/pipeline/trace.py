"""The beginning of every calibrated run: what each block receives, and the streams before the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from auto_round.calibration.rows import TokenRow
from auto_round.models.source import CPU, Stem
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
    hidden: list[Tensor] = []
    rounded: list[Tensor] = []
    with job.source.stem(CPU, job.dtype, head=False) as stem:
        table = ArgumentTable(_axes(stem, rows))
        for row in rows:
            mask = None if row.mask is None else row.mask.unsqueeze(0)
            traced = stem.trace(row.input_ids.unsqueeze(0), mask)
            table.add(traced.calls, traced.edits)
            hidden.append(traced.hidden.detach().to(job.dtype))
            if embedding is not None:
                with stem.embedding(embedding):
                    again = stem.trace(row.input_ids.unsqueeze(0), mask)
                rounded.append(again.hidden.detach().to(job.dtype))
    size = 2 * sum(h.numel() * h.element_size() for h in hidden)
    home = home_of_streams(job.options.memory, job.device, size)
    masks = None
    if any(row.mask is not None for row in rows):
        whole = torch.ones_like(rows[0].input_ids, dtype=torch.bool)
        masks = torch.stack([whole if row.mask is None else row.mask for row in rows])
    spill = scratch if home.files else None
    streams = Streams.begin(hidden, job.tuned, device=home.device, masks=masks, spill=spill)
    for i, row_hidden in enumerate(rounded):
        streams.quantized[i] = row_hidden[0]
    return table, streams


def _axes(stem: Stem, rows: Sequence[TokenRow]) -> Mapping[Place, int]:
    """How the blocks' arguments grow with the batch: the same row once and twice, a padded one if any is."""
    row = next((row for row in rows if row.mask is not None), rows[0])
    ids = row.input_ids.unsqueeze(0)
    mask = None if row.mask is None else row.mask.unsqueeze(0)
    one, two = (
        stem.trace(ids.repeat(n, 1), None if mask is None else mask.repeat(n, 1)).calls for n in (1, 2)
    )
    return batch_axes(one, two)
