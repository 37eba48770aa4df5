"""Loss of the last block: with `enable_alg_ext` the divergence of the model's predictions.

All other blocks are tuned by the squared distance of their outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from auto_round.evaluate.logits import positions_at_once
from auto_round.pipeline.deciding.job import Job
from auto_round.tuning.objective import Objective
from auto_round.tuning.predictions import Predictions

LOGITS_BYTES = 256 << 20
"""Memory for logits on a CPU, or where memory is to be spared, while predictions are compared."""
ACCELERATOR_LOGITS_BYTES = 2 << 30
"""The same on an accelerator, which needs long matrices to be busy."""


def logits_budget(job: Job) -> int:
    """Bytes for logits while predictions are compared."""
    sparing = job.device.type == "cpu" or job.options.memory.low_gpu_mem_usage
    return LOGITS_BYTES if sparing else ACCELERATOR_LOGITS_BYTES


@contextmanager
def judged(job: Job, indices: Sequence[int], objective: Objective) -> Iterator[Objective]:
    """The functions of a tuning step for a group of blocks; for the last one the head is loaded meanwhile.

    Args:
        job: the run.
        indices: blocks of the group.
        objective: for all groups but the one with the last block.
    """
    if not job.options.tune.enable_alg_ext or indices[-1] != len(job.source.blocks) - 1:
        yield objective
        return
    at_once = positions_at_once(job.source.facts.vocabulary, logits_budget(job))
    if job.rows is not None:  # positions of several rows stand in a line: no longer than a table of positions
        at_once = min(at_once, len(job.rows.rows[0]))
    with job.source.stem(job.device, job.dtype) as stem:
        by_predictions = Predictions(stem.finish, at_once)
        yield replace(objective, loss=by_predictions, judge=by_predictions)
