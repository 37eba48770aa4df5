"""Loss of the last block: with `enable_alg_ext` the divergence of the model's predictions.

All other blocks are tuned by the squared distance of their outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from auto_round.evaluate.logits import positions_at_once
from auto_round.models.source import ModelSource
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.fitting.logits import logits_budget
from auto_round.tuning.objective import Objective
from auto_round.tuning.predictions import Predictions


def positions_held(job: Job) -> int:
    """Positions whose logits are held at a time while predictions are compared; 0 without rows."""
    if job.rows is None:
        return 0
    budget = logits_budget(job.device, sparing=job.memory.low_gpu_mem_usage)
    # Positions of several rows stand in a line, no longer than a model's table of positions.
    return min(positions_at_once(job.source.facts.vocabulary, budget), len(job.rows.rows[0]))


@contextmanager
def by_predictions(
    source: ModelSource, device: torch.device, dtype: torch.dtype, objective: Objective, at_once: int
) -> Iterator[Objective]:
    """The functions of a tuning step for the last block; the head is loaded meanwhile.

    Args:
        source: the model.
        device: where the block is tuned.
        dtype: dtype in which the head runs.
        objective: for all groups but the one with the last block.
        at_once: positions whose logits are compared at a time.
    """
    with source.stem(device, dtype) as stem:
        predictions = Predictions(stem.finish, at_once)
        yield replace(objective, loss=predictions, judge=predictions)
