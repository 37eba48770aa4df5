"""torch.compile for the tuning step: used where it pays, left out where it cannot work."""

from __future__ import annotations

import math
import shutil
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.log import logger
from auto_round.pipeline.job import Job
from auto_round.tuning.sign_round import Forward

CPU_FLOPS = 3e11
ACCELERATOR_FLOPS = 1e14
"""Rough rates of a tuning step, for the decision only."""
SAVING = 0.25
"""Share of a step that compiling saves on a CPU (docs/LOG.md)."""
COMPILE_SECONDS = 15.0
"""What compiling one kind of block costs."""


def block_forward(job: Job) -> Forward:
    """How the blocks of a job are run where gradients are wanted."""
    wanted = job.options.tune.enable_torch_compile
    if not job.tunes or not job.tune.iters:
        return functional_call
    if wanted is None:
        wanted = _seconds(job) * SAVING > COMPILE_SECONDS
    if wanted and job.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        level = logger.warning if job.options.tune.enable_torch_compile else logger.info
        level("blocks are not compiled: this machine has no C++ compiler")
        return functional_call
    return CompiledForward() if wanted else functional_call


def _seconds(job: Job) -> float:
    """Rough time of all tuning steps without compiling: forward, and both gradients."""
    weights = sum(math.prod(layer.shape) for layer in job.source.layers if layer.block is not None)
    tokens = 0 if job.rows is None else len(job.rows.rows[0].input_ids)
    per_step = 6 * weights * tokens * job.tune.batch_size * job.tune.accumulate
    rate = CPU_FLOPS if job.device.type == "cpu" else ACCELERATOR_FLOPS
    return per_step * job.tune.iters / rate


def _call(
    module: nn.Module, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return functional_call(module, parameters, args, kwargs)


class CompiledForward:
    """Compiled `functional_call`; blocks of one kind share the compiled code.

    When the compiler fails on a block the reason is logged and all blocks run uncompiled.
    """

    def __init__(self) -> None:
        self._compiled: Forward | None = torch.compile(_call, dynamic=False)

    def __call__(
        self, module: nn.Module, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the module with substituted parameters."""
        if self._compiled is not None:
            try:
                return self._compiled(module, parameters, args, kwargs)
            except (RuntimeError, TypeError, AttributeError) as error:  # compilers raise subclasses of these
                logger.warning("blocks are not compiled: %s", str(error).strip().split("\n")[0])
                self._compiled = None
        return functional_call(module, parameters, args, kwargs)
