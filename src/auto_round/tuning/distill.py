"""Settings of tuning all blocks together by what the model predicts, and the steps that are taken.

Steps that worked at 2, 3 and 4 bits are in docs/LOG.md. They are small, for what is learned has been tuned
block by block already, and large ones learn the rows by heart.
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
WARM_UP = 10
"""Steps over which the step size rises."""
BETAS = (0.9, 0.99)
"""Adam's decay of the mean gradient and of the mean square."""
TINY = 1e-15
"""Added to the root of the mean square, so that nothing is divided by 0. It must stay below any gradient:
those of single offsets of a large model are small."""
OFFSET_RATE = 2e-3
"""Step of a rounding offset at 2 bits, in units of the grid's spacing; half of it for each further bit."""
RANGE_RATE = 5e-4
"""Relative step of a group's range at 2 bits; a quarter of it for each further bit."""
NORM_RATE = 5e-4
"""Step of a norm's weights, relative to their mean magnitude."""
FEATURES = 0.1
"""Weight of the hidden states: so many nats for squared errors as large as at the start, mean over blocks."""
LOOKS = 10
"""How many times the held-out rows are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Settings of the stage.

    Attributes:
        steps: optimizer steps.
        lr: step of the rounding offsets, in units of the grid's spacing; None for one that follows the bits.
            Steps of ranges grow and shrink with it.
        norms: learn the weights of norms, and biases, too.
        codes_stay: learn the steps of groups only.
        features: weight of the hidden states beside the predictions.
        seed: of the order of rows.
    """

    steps: int
    lr: float | None = None
    norms: bool = False
    codes_stay: bool = False
    features: float = FEATURES
    seed: int = 42

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"distill_steps must be at least 1, got {self.steps}")
        if self.lr is not None and not 0 < self.lr < 1:
            raise ConfigError(f"distill_lr must lie between 0 and 1, got {self.lr}")

    def offset_rate(self, bits: int) -> float:
        """Step of the rounding offsets of a grid of so many bits."""
        return OFFSET_RATE * 2.0 ** (2 - bits) if self.lr is None else self.lr

    def range_rate(self, bits: int) -> float:
        """Relative step of the ranges."""
        usual = OFFSET_RATE * 2.0 ** (2 - bits)
        return RANGE_RATE * 4.0 ** (2 - bits) * self.offset_rate(bits) / usual

    def factor(self, step: int) -> float:
        """Factor of all steps at one of them: a short rise, then half a cosine."""
        rise = min(1.0, (step + 1) / WARM_UP)
        return rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    @property
    def looks(self) -> frozenset[int]:
        """Steps after which the held-out rows are looked at."""
        every = max(1, self.steps // LOOKS)
        return frozenset({*range(every, self.steps, every), self.steps})


def distill_settings(tune: TuneOptions, seed: int) -> DistillConfig:
    """Settings of the stage, from what the user asked for."""
    return DistillConfig(
        steps=tune.distill_steps,
        lr=tune.distill_lr,
        norms=tune.enable_norm_bias_tuning,
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
    """How far a parameter moves in a step.

    Attributes:
        size: of the step.
        relative: to the parameter itself.
    """

    size: float
    relative: bool = False


def adam_step(
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    moments: dict[str, Tensor],
    rates: Mapping[str, Rate],
    *,
    step: int,
    factor: float,
) -> None:
    """One step of Adam (arXiv 1412.6980, algorithm 1); what has no gradient in it stays.

    Args:
        values: parameters, changed in place.
        gradients: of some of them.
        moments: `mean.NAME` and `square.NAME` of each parameter, made at its first step and changed in place.
        rates: of each parameter.
        step: steps taken before.
        factor: of all steps.
    """
    first, second = BETAS
    for name, gradient in gradients.items():
        value, rate = values[name], rates[name]
        if (mean := moments.get(f"mean.{name}")) is None:
            mean = moments[f"mean.{name}"] = torch.zeros_like(value)
        if (square := moments.get(f"square.{name}")) is None:
            square = moments[f"square.{name}"] = torch.zeros_like(value)
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (square / (1 - second ** (step + 1))).sqrt_().add_(TINY)
        size = factor * rate.size / (1 - first ** (step + 1))
        if rate.relative:
            value.addcmul_(value, mean / root, value=-size)
        else:
            value.addcdiv_(mean, root, value=-size)
