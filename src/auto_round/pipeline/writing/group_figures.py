"""What is kept of a group of blocks beside its tensors: figures for the journal, a digest for other ranks."""

from __future__ import annotations

import math
from typing import Any

from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.running.attention_states import steps_entry
from auto_round.pipeline.running.tune_group import GroupResult
from auto_round.pipeline.writing.outputs import checksum


def figures_of(result: GroupResult) -> dict[str, Any]:
    """What a report says about a group of blocks; `best_step` and losses only where it was tuned."""
    tuned, massive = result.tuned, result.massive
    found: dict[str, Any] = {}
    if not math.isnan(tuned.loss):
        found = {"initial_loss": tuned.initial_loss, "loss": tuned.loss, "best_step": tuned.best_step}
    if massive.tokens:
        found |= {"massive_tokens": massive.tokens, "massive_energy": massive.energy}
    if result.experts:
        found["experts"] = dict(result.experts)
    steps = steps_entry(result.states)
    return found | {"errors": dict(result.errors), **result.ranges.to_entry(), **steps}


def digest_of(job: Job, result: GroupResult) -> object:
    """What all ranks must have come to alike; nothing where there is one."""
    if job.ranks.size == 1:
        return None
    codes = {name: checksum(q.weight.codes) for name, (_, q) in result.layers.items()}
    return codes, result.tuned.best_step, str(result.tuned.loss)
