"""Steps of the tuning loop: optimizers, step sizes, batch sizes, and when the held-out loss is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid, IntGrid
from auto_round.tuning.config import Optimizer, TuneConfig

ADAM_LR = 0.02
"""Adam's step for rounding offsets, in quantization steps (measured: docs/LOG.md)."""
ADAM_RANGE_LR = 0.005
"""Adam's step for range multipliers (measured: docs/LOG.md)."""
GROWTH = ((0.6, 0.25), (0.8, 0.5), (1.0, 1.0))
"""(part of the run, share of the batch): steps before that part use that share (measured: docs/LOG.md)."""
LOOKS = 10
"""How many times the held-out loss is looked at during a run."""
STEPS_BETWEEN_LOOKS = 10
"""Fewest steps between two looks: each costs about as much as a step. The last step is always looked at."""

CANCELLED_BELOW, CANCELLED_ABOVE = 50, 4
"""Steps of a run and bits of a weight between which codes whose errors cancel never are the best (measured:
docs/LOG.md)."""


class Stepper(Protocol):
    """Changes parameters in place from their gradients."""

    def step(self, gradients: Sequence[Tensor | None], factor: float) -> None:
        """Take one step, its size multiplied by `factor`; gradients may be overwritten."""
        ...


class SignDescent:
    """`p -= lr * sign(g)`; with momentum the sign of the running sum.

    Source: SignRound (arXiv 2309.05516), section 3 and algorithm 1.
    """

    def __init__(self, groups: Sequence[tuple[list[Tensor], float]], momentum: float) -> None:
        self._items = [(p, lr) for group, lr in groups for p in group]
        self._momentum = momentum
        self._buffers = [torch.zeros_like(p) for p, _ in self._items] if momentum else []

    def step(self, gradients: Sequence[Tensor | None], factor: float) -> None:
        """One signed step; a parameter without gradient stays."""
        for i, ((p, lr), g) in enumerate(zip(self._items, gradients, strict=True)):
            if g is None:
                continue
            direction = g
            if self._momentum:
                direction = self._buffers[i].mul_(self._momentum).add_(g)
            stack = p.dim() > 2  # no second copy of all experts' signs
            for piece, way in zip(*(x.unbind() if stack else (x,) for x in (p, direction)), strict=True):
                # In a gradient's own memory, if it has some: a large new tensor costs more than its signs.
                # Two parameters that share one find its signs, which have the same signs.
                used_up = not self._momentum and way.is_contiguous()
                piece.add_(way.sign_() if used_up else way.sign(), alpha=-lr * factor)


class Adam:
    """Adam (arXiv 1412.6980, algorithm 1) without weight decay."""

    def __init__(self, groups: Sequence[tuple[list[Tensor], float]]) -> None:
        self._optimizers = [
            (torch.optim.Adam(group, lr=lr, betas=(0.9, 0.999), foreach=True), lr)
            for group, lr in groups
            if group
        ]

    def step(self, gradients: Sequence[Tensor | None], factor: float) -> None:
        """One step."""
        pending = iter(gradients)
        for optimizer, lr in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
                for p in group["params"]:
                    p.grad = next(pending)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def step_factor(config: TuneConfig, step: int) -> float:
    """Factor of the step size at a step: linear decay to 0, for Adam half a cosine, or the user's own."""
    if config.schedule is not None:
        return config.schedule(step, config.iters)
    progress = step / config.iters
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.optimizer is Optimizer.ADAM else 1 - progress


def batch_rows(config: TuneConfig, step: int) -> int:
    """Rows of a step: a quarter of the batch at first, then half of it, all of it in the last fifth of a run.

    While steps are large a noisy direction is as good as an exact one; only small steps gain from more rows.
    Source: arXiv 1711.00489, section 3.
    """
    if not config.growing_batch:
        return config.batch_size
    share = next(share for until, share in GROWTH if step < until * config.iters)
    return max(1, round(config.batch_size * share))


def rows_seen(config: TuneConfig) -> int:
    """Rows that go through a block in all steps together, if there are enough of them for whole batches."""
    return sum(batch_rows(config, step) for step in range(config.iters)) * config.accumulate


def held_out_looks(config: TuneConfig) -> list[int]:
    """Steps after which the held-out loss is looked at: in the second half, or throughout with `patience`.

    While steps are large the loss still falls by far more than it could rise again.
    """
    every = max(STEPS_BETWEEN_LOOKS, config.iters // LOOKS)
    first = every if config.patience else max(every, config.iters // 2)
    looks = [step for step in range(every, config.iters, every) if step >= first]
    return [*looks, config.iters]


def worth_cancelling(iters: int, grids: Iterable[Grid], *, rounds_inputs: bool) -> bool:
    """Whether codes whose errors cancel may be better than what steps learn.

    Steps learn little where they are few, where weights have so many bits that the noise of bfloat16 is as
    large as what can be learned, and where rounded inputs are most of the error. Elsewhere none of some 900
    blocks was better with them.

    Args:
        iters: steps of the run.
        grids: what the weights are rounded to.
        rounds_inputs: whether inputs are rounded, too.
    """
    fine = any(type(grid) is not IntGrid or grid.bits > CANCELLED_ABOVE for grid in grids)
    return iters < CANCELLED_BELOW or rounds_inputs or fine


def range_rate(config: TuneConfig, end_steps: float) -> float:
    """Step size of the range multipliers.

    A multiplier that changes by `r` moves a group's outermost weights by `r * end_steps` quantization steps.
    By default that is as far as a step of an offset moves them, whatever the grid: half a percent is more of
    a grid with 8 steps to each side than of one with 2 (docs/LOG.md).
    """
    if config.range_lr is not None:
        return config.range_lr
    if config.optimizer is Optimizer.ADAM:
        return ADAM_RANGE_LR
    return _offset_rate(config) / end_steps


def make_stepper(
    config: TuneConfig, offsets: list[Tensor], ranges: Sequence[tuple[Tensor, float]], others: list[Tensor]
) -> Stepper:
    """Optimizer over rounding offsets, range multipliers and other parameters (in this order).

    Args:
        config: settings of the loop.
        offsets: rounding offsets.
        ranges: range multipliers, each with the `end_steps` of the grid that its groups are rounded to.
        others: norm weights and biases.
    """
    by_rate = groupby(ranges, key=lambda pair: range_rate(config, pair[1]))
    groups = [
        (offsets, _offset_rate(config)),
        *(([p for p, _ in pairs], rate) for rate, pairs in by_rate),
        (others, range_rate(config, 1.0) * 0.2),
    ]
    return Adam(groups) if config.optimizer is Optimizer.ADAM else SignDescent(groups, config.momentum)


def sign_move(config: TuneConfig, step: int) -> float | None:
    """How far a step moves each offset, by the sign of its gradient alone; None where more is needed."""
    if config.optimizer is Optimizer.ADAM or config.momentum:
        return None
    return _offset_rate(config) * step_factor(config, step)


def _offset_rate(config: TuneConfig) -> float:
    if config.lr is not None:
        return config.lr
    return ADAM_LR if config.optimizer is Optimizer.ADAM else 1.0 / max(config.iters, 1)
