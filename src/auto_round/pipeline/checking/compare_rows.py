"""Rows on which a reloaded folder is compared with the tuned model: texts together, images one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auto_round.calibration.row import CalibrationRow, joined
from auto_round.evaluate.logits import COMPARED_BYTES, Comparison, positions_at_once
from auto_round.models.roles import text_model
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.fitting.logits import VERIFIED_POSITIONS, VERIFIED_ROWS
from auto_round.pipeline.running.measure import Measured, counted

PROMPT_TOKENS = 16
"""Fewest positions that are compared, and tokens from which a sample goes on."""


@dataclass(frozen=True, slots=True)
class Window:
    """Predictions of a row that are compared: those made at positions `start ... end - 1`.

    Attributes:
        held_out: number of the row among those held out.
        row: the row; text is cut behind its last position that is compared.
        start: first position.
        end: position after the last.
    """

    held_out: int
    row: CalibrationRow
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ComparedRows:
    """Rows that go through the reloaded model together.

    Attributes:
        windows: what is compared of each.
        tuned: predictions of the tuned model in each window, `[end - start, vocabulary]`.
    """

    windows: tuple[Window, ...]
    tuned: tuple[Tensor, ...]


def batches(job: Job, measured: Measured) -> list[ComparedRows]:
    """What to compare, with the predictions of the tuned model: rows of both kinds where there are both."""
    held_out = job.held_out
    pictured = [i for i, row in enumerate(held_out) if row.beside_text]
    plain = [i for i, row in enumerate(held_out) if not row.beside_text]
    chosen = plain[: VERIFIED_ROWS - min(VERIFIED_ROWS // 2, len(pictured))]
    windows = [_window(job, i, held_out[i]) for i in [*chosen, *pictured[: VERIFIED_ROWS - len(chosen)]]]
    together = [window for window in windows if not window.row.beside_text]
    alone = [[window] for window in windows if window.row.beside_text]
    return [_with_tuned(job, measured, group) for group in ([together] if together else []) + alone]


def _window(job: Job, number: int, row: CalibrationRow) -> Window:
    """As many positions as memory holds logits of: the first of a text, the last of a row with images."""
    affordable = COMPARED_BYTES // (VERIFIED_ROWS * job.source.facts.vocabulary * job.dtype.itemsize)
    length = min(VERIFIED_POSITIONS, len(row), max(PROMPT_TOKENS, affordable))
    if not row.beside_text:
        return Window(number, row.beginning(length), 0, length - 1)
    last = len(row) if row.mask is None else int(row.mask.nonzero().max()) + 1
    return Window(number, row, max(0, last - length), last - 1)


def _with_tuned(job: Job, measured: Measured, windows: Sequence[Window]) -> ComparedRows:
    step = positions_at_once(job.source.facts.vocabulary)
    with job.source.stem(job.device, job.dtype) as stem:
        found = []
        for window in windows:
            parts = []
            for start in range(window.start, window.end, step):
                place = slice(start, min(start + step, window.end))
                hidden = measured.final_hidden[window.held_out : window.held_out + 1, place]
                parts.append(stem.finish(hidden.to(job.device), measured.head)[0].to(job.dtype))
            found.append(torch.cat(parts))
    return ComparedRows(tuple(windows), tuple(found))


def compare(job: Job, model: Any, batch: ComparedRows, comparison: Comparison) -> tuple[float, list[Tensor]]:
    """Tuned against reloaded predictions, added to `comparison`.

    Returns:
        The largest difference of any two logits, and each position's divergence.
    """
    largest, each = 0.0, []
    inputs = joined([window.row for window in batch.windows])
    runs = model if batch.windows[0].row.beside_text else text_model(model)
    given = {n: v.to(job.device, job.dtype if v.is_floating_point() else None) for n, v in inputs.items()}
    with torch.no_grad():
        reloaded = runs(**given, use_cache=False).logits
    step = positions_at_once(reloaded.shape[-1])
    for i, (window, tuned) in enumerate(zip(batch.windows, batch.tuned, strict=True)):
        for start in range(window.start, window.end, step):
            end = min(start + step, window.end)
            real = counted(window.row, start, end)
            where = None if real is None else real.to(job.device)
            wanted, got = tuned[start - window.start : end - window.start], reloaded[i, start:end]
            following = window.row.tokens[start + 1 : end + 1].to(job.device)
            each.append(comparison.add(wanted, got, following, where))
            largest = max(largest, float((wanted.float() - got.float()).abs().max()))
    return largest, each
