"""torch.compile for the tuning step: whether it saves more time than it takes, and whether it can work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from auto_round.facts.layer import Block, Layer
from auto_round.log import logger
from auto_round.schemes.plan import Plan
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.objective import PLAIN, Objective, block_objective
from auto_round.tuning.steps import batch_rows, rows_seen
from auto_round.tuning.weights import fake_weights

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


def objective_for(steps: TuningSteps) -> Objective:
    """The functions of a tuning step, compiled where that is asked for or saves time."""
    level = logger.warning if steps.wanted else logger.info
    if steps.rounds_inputs:
        # Inputs are rounded in hooks, which compiled code of another block would not see.
        level("blocks are not compiled: activations are quantized")
        return PLAIN
    if steps.several:
        level("blocks are not compiled: their matrices lie on several devices")
        return PLAIN
    if steps.stacks and steps.device.type == "cpu":
        level("blocks are not compiled: their experts run matrix by matrix")
        return PLAIN
    if steps.kinds > MOST_KINDS:
        level("blocks are not compiled: there are %d kinds of them, more than PyTorch keeps", steps.kinds)
        return PLAIN
    wanted = steps.wanted
    if wanted is None:
        wanted = steps.seconds * SAVING > COMPILE_SECONDS * steps.kinds
    if wanted and steps.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        level("blocks are not compiled: this machine has no C++ compiler")
        return PLAIN
    return compiled_objective() if wanted else PLAIN


def block_kinds(plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block]) -> int:
    """How many times a step has to be compiled: blocks with equal matrices and formats share the code."""
    kinds: dict[int, list[Any]] = {}
    for layer in layers:
        if layer.block is not None:
            inside = layer.parameter.removeprefix(blocks[layer.block].module)
            kinds.setdefault(layer.block, []).append((inside, layer.shape, plan.format_of(layer.name)))
    return len({tuple(kind) for kind in kinds.values()})


def in_equal_passes(config: TuneConfig, tuned: int, ranks: int = 1) -> TuneConfig:
    """The same settings, but every pass through the block has the same number of rows.

    Compiled code is made for one shape, while batches grow during a run: so each batch is cut into passes of
    a size that divides all of them.

    Args:
        config: settings of the loop.
        tuned: rows that are tuned on.
        ranks: how many processes have to find passes in the smallest batch, if it has as many rows.
    """
    sizes = {min(batch_rows(config, step), tuned) for step in range(config.iters)}
    common = math.gcd(*sizes)
    most = min(common, config.rows_at_once or common, -(-min(sizes) // ranks))
    return replace(config, rows_at_once=next(n for n in range(most, 0, -1) if common % n == 0))


def step_operations(layers: Sequence[Layer], tokens: int, config: TuneConfig) -> float:
    """Floating-point operations of all tuning steps: forward, and both gradients, 2 a weight and token each.

    Args:
        layers: the layers of the model.
        tokens: tokens of a row.
        config: settings of the loop.
    """
    weights = sum(math.prod(layer.shape) for layer in layers if layer.block is not None)
    return 6.0 * weights * tokens * rows_seen(config)


def compiled_objective(backend: str | Callable[..., Any] = "inductor") -> Objective:
    """Both functions of a tuning step, compiled; blocks of one kind share the compiled code.

    Args:
        backend: compiler of `torch.compile`.
    """
    compiled = _Compiled(fake_weights, backend), _Compiled(block_objective, backend)
    return Objective(*compiled, matrix_by_matrix=False)


class _Compiled:
    """A compiled function; when the compiler fails the reason is logged and the plain function runs."""

    def __init__(self, plain: Callable[..., Any], backend: str | Callable[..., Any]) -> None:
        self._plain = plain
        self._compiled: Callable[..., Any] | None = torch.compile(plain, dynamic=False, backend=backend)

    def __call__(self, *arguments: Any) -> Any:
        """What the plain function gives."""
        if self._compiled is not None:
            try:
                return self._compiled(*arguments)
            except (RuntimeError, TypeError, AttributeError) as error:  # compilers raise subclasses of these
                logger.warning("blocks are not compiled: %s", str(error).strip().split("\n")[0])
                self._compiled = None
        return self._plain(*arguments)
