"""torch.compile for the tuning step: used where it pays, left out where it cannot work."""

from __future__ import annotations

import math
import shutil
from typing import Any

import torch
from torch import Tensor

from auto_round.log import logger
from auto_round.pipeline.job import Job
from auto_round.tuning.sign_round import Objective, block_objective

CPU_FLOPS = 3e11
ACCELERATOR_FLOPS = 1e14
"""Rough rates of a tuning step, for the decision only."""
SAVING = 0.3
"""Share of a step that compiling saves on a CPU (docs/LOG.md)."""
COMPILE_SECONDS = 20.0
"""What compiling one kind of block costs."""


def objective_for(job: Job) -> Objective:
    """What the tuning steps of a job differentiate: compiled where it pays."""
    wanted = job.options.tune.enable_torch_compile
    if not job.tunes or not job.tune.iters:
        return block_objective
    if wanted is None:
        wanted = _seconds(job) * SAVING > COMPILE_SECONDS
    if wanted and job.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        level = logger.warning if job.options.tune.enable_torch_compile else logger.info
        level("blocks are not compiled: this machine has no C++ compiler")
        return block_objective
    return CompiledObjective() if wanted else block_objective


def _seconds(job: Job) -> float:
    """Rough time of all tuning steps without compiling: forward, and both gradients."""
    weights = sum(math.prod(layer.shape) for layer in job.source.layers if layer.block is not None)
    tokens = 0 if job.rows is None else len(job.rows.rows[0].input_ids)
    per_step = 6 * weights * tokens * job.tune.batch_size * job.tune.accumulate
    rate = CPU_FLOPS if job.device.type == "cpu" else ACCELERATOR_FLOPS
    return per_step * job.tune.iters / rate


class CompiledObjective:
    """Compiled `block_objective`; blocks of one kind share the compiled code.

    When the compiler fails on a block the reason is logged and all blocks run uncompiled.
    """

    def __init__(self) -> None:
        self._compiled: Objective | None = torch.compile(block_objective, dynamic=False)

    def __call__(self, *arguments: Any) -> Tensor:
        """Loss of a block; arguments of `block_objective`."""
        if self._compiled is not None:
            try:
                return self._compiled(*arguments)
            except (RuntimeError, TypeError, AttributeError) as error:  # compilers raise subclasses of these
                logger.warning("blocks are not compiled: %s", str(error).strip().split("\n")[0])
                self._compiled = None
        return block_objective(*arguments)
