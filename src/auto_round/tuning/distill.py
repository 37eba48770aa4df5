"""Settings of tuning all blocks together by what the model predicts, and the steps that are taken.

The gradient of a single offset, from the few tokens of a step, is mostly noise, and a code that noise moves
makes the model worse. So offsets do not walk: an offset lies where the sum of its gradients so far, over the
root of the sum of their squares, puts it (dual averaging, with the measure of AdaGrad). That quotient is
about a normal number where there is nothing but noise, after any number of steps, and grows with the root of
their number where gradients agree. Ranges and norms, of which each gathers many weights, move by Adam. Steps
that worked are in docs/LOG.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.config.tuning import TuneOptions
from auto_round.errors import ConfigError

STEP_TOKENS = 1024
"""Tokens of a step, as far as whole rows allow."""
WARM_UP = 3
"""Steps over which the step size rises."""
BETAS = (0.9, 0.99)
"""Adam's decay of the mean gradient and of the mean square."""
TINY = 1e-15
"""Added to the root of the mean square, so that nothing is divided by 0. It must stay below any gradient:
those of single offsets of a large model are small."""
OFFSET_REACH = 0.04
"""How far an offset lies from its start for each standard deviation by which the sum of its gradients differs
from 0, in units of the grid's spacing: those that began `weights.MARGIN` inside cross at 2.5."""
RANGE_RATE = 3e-3
"""Relative step of a group's range at 2 bits; a quarter of it for each further bit."""
NORM_RATE = 3e-3
"""Step of norms and biases at 2 bits, relative to their mean magnitude; a quarter of it for each bit more."""
FEATURES = 0.1
"""Weight of the hidden states: so many nats for squared errors as large as at the start, mean over blocks."""
LOOKS = 10
"""How many times the held-out rows are looked at."""
STEPS_BETWEEN_LOOKS = 2
"""Fewest steps between two looks: each costs about half of a step. The last step is always looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Settings of the stage.

    Attributes:
        steps: optimizer steps.
        lr: how far offsets move, see `OFFSET_REACH`; steps of ranges grow and shrink with it.
        codes_stay: learn the steps of groups only.
        features: weight of the hidden states beside the predictions.
        seed: of the order of rows.
    """

    steps: int
    lr: float = OFFSET_REACH
    codes_stay: bool = False
    features: float = FEATURES
    seed: int = 42

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"distill_steps must be at least 1, got {self.steps}")
        if not 0 < self.lr < 1:
            raise ConfigError(f"distill_lr must lie between 0 and 1, got {self.lr}")

    def range_rate(self, bits: int) -> float:
        """Relative step of the ranges of a grid of so many bits."""
        return RANGE_RATE * 4.0 ** (2 - bits) * self.lr / OFFSET_REACH

    def norm_rate(self, bits: int) -> float:
        """Step of norms and biases beside weights of so many bits, relative to their mean magnitude."""
        return NORM_RATE * 4.0 ** (2 - bits) * self.lr / OFFSET_REACH

    def factor(self, step: int) -> float:
        """Factor of Adam's steps at one of them: a short rise, then half a cosine."""
        return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def rise(self, step: int) -> float:
        """Factor of the reach of offsets behind a step; 0 before the first.

        It grows to the end: codes that one and the same error of the model would move cross one after the
        other, and ranges and norms take first what they can.
        """
        return (step + 1) / self.steps

    @property
    def looks(self) -> frozenset[int]:
        """Steps after which the held-out rows are looked at."""
        return looks(self.steps)


def looks(steps: int) -> frozenset[int]:
    """Steps of so many after which the held-out rows are looked at."""
    every = max(STEPS_BETWEEN_LOOKS, steps // LOOKS)
    return frozenset({*range(every, steps, every), steps})


def distill_settings(tune: TuneOptions, seed: int) -> DistillConfig:
    """Settings of the stage, from what the user asked for."""
    return DistillConfig(
        steps=tune.distill_steps,
        lr=OFFSET_REACH if tune.distill_lr is None else tune.distill_lr,
        codes_stay=tune.distill_scales_only,
        seed=seed,
    )


def rows_of_step(seqlen: int) -> int:
    """Rows of a step."""
    return max(1, STEP_TOKENS // seqlen)


def row_order(count: int, per_step: int, steps: int, seed: int) -> list[list[int]]:
    """Which rows each step sees: all of them in an order of chance, then again in another.

    Args:
        count: rows there are.
        per_step: rows of a step; fewer where there are not as many.
        steps: optimizer steps.
        seed: of the orders.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(per_step, count)
    left: list[int] = []
    found: list[list[int]] = []
    for _ in range(steps):
        if len(left) < size:
            left = torch.randperm(count, generator=generator, device="cpu").tolist()
        found.append(sorted(left[:size]))
        left = left[size:]
    return found


@dataclass(frozen=True, slots=True)
class Rate:
    """How far a parameter moves.

    Attributes:
        size: of the step.
        relative: to the parameter itself.
        summed: `size` is a reach, see `OFFSET_REACH`, and the sum of all gradients decides.
    """

    size: float
    relative: bool = False
    summed: bool = False


def take_step(
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    moments: dict[str, Tensor],
    rates: Mapping[str, Rate],
    *,
    step: int,
    config: DistillConfig,
) -> None:
    """Move what is learned; what has no gradient in it stays.

    Args:
        values: parameters, changed in place.
        gradients: of some of them.
        moments: `mean.NAME` (or `sum.NAME`) and `square.NAME` of each parameter, made at its first step and
            changed in place.
        rates: of each parameter.
        step: steps taken before.
        config: how far steps go.
    """
    for name, gradient in gradients.items():
        value, rate = values[name], rates[name]
        kinds = ("sum" if rate.summed else "mean", "square")
        for kind in kinds:
            if f"{kind}.{name}" not in moments:
                moments[f"{kind}.{name}"] = torch.zeros_like(value)
        first, square = (moments[f"{kind}.{name}"] for kind in kinds)
        if rate.summed:
            before, behind = (rate.size * config.rise(k) for k in (step - 1, step))
            value.addcdiv_(first, square.sqrt().add_(TINY), value=before)
            first.add_(gradient)
            square.addcmul_(gradient, gradient)
            value.addcdiv_(first, square.sqrt().add_(TINY), value=-behind)
        else:
            _adam_step(value, gradient, (first, square), rate, step, config.factor(step))


def _adam_step(
    value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], rate: Rate, step: int, factor: float
) -> None:
    """One step of Adam (arXiv 1412.6980, algorithm 1), all in place."""
    (first, second), (mean, square) = BETAS, moments
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (square / (1 - second ** (step + 1))).sqrt_().add_(TINY)
    size = factor * rate.size / (1 - first ** (step + 1))
    if rate.relative:
        value.addcmul_(value, mean / root, value=-size)
    else:
        value.addcdiv_(mean, root, value=-size)
