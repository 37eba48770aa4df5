"""Held-out rows: perplexity before and after, and the logits that a reloaded folder must reproduce."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from auto_round.calibration.row import CalibrationRow
from auto_round.evaluate.histogram import Histogram
from auto_round.evaluate.logits import Comparison, positions_at_once
from auto_round.models.source import CPU
from auto_round.numerics.qtensor import QTensor
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.running.head import head_weight
from auto_round.pipeline.running.streams import Streams


@dataclass(frozen=True, slots=True)
class Measured:
    """Result on the held-out rows.

    Attributes:
        comparison: original against quantized model.
        final_hidden: output of the last block of the quantized model for the held-out rows,
            `[rows, length, width]`: the first of its `States`.
        head: the quantized head's weight in compute dtype; None when the head is kept.
        spread: how the divergence is spread over the positions.
    """

    comparison: Comparison
    final_hidden: Tensor
    head: Tensor | None
    spread: Histogram


def measure_streams(job: Job, streams: Streams, head: QTensor | None) -> Measured:
    """Compare both streams after the last block."""
    rows = job.all_rows
    comparison, spread = Comparison(), Histogram()
    weight = head_weight(job, head)
    quantized = streams.quantized[0][streams.tuned :]
    reference = streams.reference[0][streams.tuned :]
    with job.source.stem(job.device, job.dtype) as stem:
        for i, row in enumerate(rows[streams.tuned :]):
            step = positions_at_once(job.source.facts.vocabulary)
            for start in range(0, len(row) - 1, step):
                end = min(start + step, len(row) - 1)
                before = stem.finish(reference[i : i + 1, start:end].to(job.device))[0]
                after = stem.finish(quantized[i : i + 1, start:end].to(job.device), weight)[0]
                following = row.tokens[start + 1 : end + 1].to(before.device)
                mask = counted(row, start, end)
                counts = None if mask is None else mask.to(before.device)
                spread.add(comparison.add(before, after, following, counts))
    return Measured(comparison, quantized.to(CPU), weight, spread)


def counted(row: CalibrationRow, start: int, end: int) -> Tensor | None:
    """Which of the predictions made at positions `start ... end - 1` count: `[positions]` bool; None for all.

    A prediction counts when the token before it and the token it predicts are no padding.
    """
    return None if row.mask is None else row.mask[start:end] & row.mask[start + 1 : end + 1]
