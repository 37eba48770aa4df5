"""torch.compile for the tuning step: whether it saves more time than it takes, and whether it can work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.facts.layer import Block, Layer
from auto_round.pipeline.deciding.activations import activation_formats
from auto_round.pipeline.deciding.image_rows import first_with_images
from auto_round.pipeline.deciding.job import Job
from auto_round.schemes.plan import Plan
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.steps import rows_seen

CPU_FLOPS = 3e11
ACCELERATOR_FLOPS = 1e14
"""Rough rates of a tuning step, operations per second: only to decide whether compiling pays."""
SAVING = 0.3
"""Share of a step that compiling saves on a CPU (docs/LOG.md)."""
COMPILE_SECONDS = 40.0
"""What compiling one kind of block costs, caches cold, on an ordinary core; twice that where two are slow."""
MOST_KINDS = 8
"""Most kinds of blocks for which PyTorch keeps compiled code of one function; for more it keeps none."""


@dataclass(frozen=True, slots=True)
class TuningSteps:
    """What decides whether the tuning step of a run is compiled.

    Attributes:
        wanted: what the user said; None where that is left to us.
        kinds: how many times a step has to be compiled, see `block_kinds`.
        rounds_inputs: inputs of layers are quantized.
        operations: floating-point operations of all steps, see `step_operations`.
        device: where blocks are tuned.
        several: their matrices lie on several devices.
        stacks: some hold experts in one parameter, which run matrix by matrix on a processor.
    """

    wanted: bool | None
    kinds: int
    rounds_inputs: bool
    operations: float
    device: torch.device
    several: bool = False
    stacks: bool = False

    @property
    def seconds(self) -> float:
        """Rough time of all steps without compiling."""
        return self.operations / (CPU_FLOPS if self.device.type == "cpu" else ACCELERATOR_FLOPS)

    @property
    def compiled(self) -> bool:
        """Whether they are compiled: where that is asked for or saves time, and can work."""
        return self._worth and not self.hindrance

    @property
    def _worth(self) -> bool:
        if self.wanted is None:
            return self.seconds * SAVING > COMPILE_SECONDS * self.kinds
        return self.wanted

    @property
    def hindrance(self) -> str:
        """Why they cannot be compiled; empty where they can."""
        on_cpu = self.device.type == "cpu"
        if self.rounds_inputs:
            # Inputs are rounded in hooks, which compiled code of another block would not see.
            return "activations are quantized"
        if self.several:
            return "their matrices lie on several devices"
        if self.stacks and on_cpu:
            return "their experts run matrix by matrix"
        if self.kinds > MOST_KINDS:
            return f"there are {self.kinds} kinds of them, more than PyTorch keeps"
        if self._worth and on_cpu and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            return "this machine has no C++ compiler"
        return ""


def tuning_steps(job: Job) -> TuningSteps | None:
    """The steps of a run; None where there are none, or where rows have many shapes, as those with images."""
    rows = None if job.rows is None else job.rows.rows
    none = not job.tunes if rows is not None else not job.tune.needs_rows  # rows that are not fetched yet
    if none or not job.tune.iters or (rows is not None and first_with_images(rows) is not None):
        return None
    source = job.source
    length = job.options.calibration.seqlen if rows is None else len(rows[0])
    return TuningSteps(
        wanted=job.options.tune.enable_torch_compile,
        kinds=block_kinds(job.plan, source.layers, source.blocks),
        rounds_inputs=bool(activation_formats(job.plan, source.layers)),
        operations=step_operations(source.layers, length, job.tune),
        device=job.device,
        several=job.placement is not None and job.placement.several,
        stacks=any(layer.expert is not None for layer in source.layers),
    )


def block_kinds(plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block]) -> int:
    """How many times a step has to be compiled: blocks with equal matrices and formats share the code."""
    kinds: dict[int, list[Any]] = {}
    for layer in layers:
        if layer.block is not None:
            inside = layer.parameter.removeprefix(blocks[layer.block].module)
            kinds.setdefault(layer.block, []).append((inside, layer.shape, plan.format_of(layer.name)))
    return len({tuple(kind) for kind in kinds.values()})


def step_operations(layers: Sequence[Layer], tokens: int, config: TuneConfig) -> float:
    """Floating-point operations of all tuning steps: forward, and both gradients, 2 a weight and token each.

    Args:
        layers: the layers of the model.
        tokens: tokens of a row.
        config: settings of the loop.
    """
    weights = sum(layer.weights for layer in layers if layer.block is not None)
    return 6.0 * weights * tokens * rows_seen(config)
