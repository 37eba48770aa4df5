"""Settings of tuning all blocks together by what the model predicts, and the steps that are taken.

Everything that is learned moves by Adam. The gradient of a single offset, from the few tokens of a step, is
mostly noise, and a code that noise moves makes the model worse. Over all steps noise moves an offset by about
its step size times the root of their number, and what gradients agree on by the size times the number: so
from 200 steps on longer runs take smaller steps, and gain far more. Rates that worked are in docs/LOG.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from auto_round.config.tuning import TuneOptions

STEP_TOKENS = 1024
"""Tokens of a step, as far as whole rows allow."""
WARM_UP = 20
"""Steps over which the step size rises, a tenth of all at most: the first of Adam's steps know no more than
the sign of one gradient each."""
BETAS = (0.9, 0.99)
"""Adam's decay of the mean gradient and of the mean square."""
LONGEST = 2.0
"""Longest gradient of a parameter, in units of what is usual: the mean of lengths that decays as that of
gradients does."""
TINY = 1e-15
"""Added to the root of the mean square, so that nothing is divided by 0. It must stay below any gradient:
those of single offsets of a large model are small."""
FUSED = ("cpu", "cuda")
"""Devices for which PyTorch has a program of one pass over memory."""
NOISE = 0.085
"""How far noise alone moves an offset in a run of 200 steps or more, less in shorter ones (`FARTHEST`), in
units of the grid's spacing: offsets that began `weights.MARGIN` inside of their codes stay there."""
FARTHEST = 0.006
"""Largest step of an offset when none is asked for, in units of the grid's spacing: in short runs larger ones
change codes before gradients agree (docs/LOG.md)."""
RANGE_RATE = 6e-3
"""Relative step of a group's range at 2 bits; a quarter of it for each further bit."""
NORM_RATE = 3e-3
"""Step of norms and biases at 2 bits, relative to their mean magnitude; a quarter of it for each bit more."""
FEATURES = 0.4
"""Weight of the hidden states: so many nats for squared errors as large as at the start, mean over blocks."""
LOOKS = (0.25, 0.5, 0.75, 0.9, 1.0)
"""After which parts of a run the held-out rows are looked at. Each look costs half of a step to a whole one,
and of the steps before the last tenth hardly any was ever the best (docs/LOG.md)."""
STEPS_BETWEEN_LOOKS = 2
"""Fewest steps between two looks, and before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Settings of the stage; `TuneOptions` says what they can be.

    Attributes:
        steps: optimizer steps, at least 1.
        lr: step of an offset in units of the grid's spacing; steps of ranges and norms grow and shrink with
            it. None for what suits the number of steps.
        codes_stay: learn the steps of groups only.
        features: weight of the hidden states beside the predictions.
        seed: of the order of rows.
    """

    steps: int
    lr: float | None = None
    codes_stay: bool = False
    features: float = FEATURES
    seed: int = 42

    @property
    def offset_rate(self) -> float:
        """Step of an offset, in units of the grid's spacing."""
        return self._usual if self.lr is None else self.lr

    def range_rate(self, bits: int) -> float:
        """Relative step of the ranges of a grid of so many bits."""
        return RANGE_RATE * 4.0 ** (2 - bits) * self.offset_rate / self._usual

    def norm_rate(self, bits: int) -> float:
        """Step of norms and biases beside weights of so many bits, relative to their mean magnitude."""
        return NORM_RATE * 4.0 ** (2 - bits) * self.offset_rate / self._usual

    @property
    def _usual(self) -> float:
        return min(FARTHEST, NOISE / math.sqrt(self.steps))

    def factor(self, step: int) -> float:
        """Factor of the size of one of the steps: a short rise, then half a cosine."""
        rise = min(1.0, (step + 1) / max(1, min(WARM_UP, self.steps // 10)))
        return rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    @property
    def looks(self) -> frozenset[int]:
        """Steps after which the held-out rows are looked at."""
        found = [self.steps]
        for part in reversed(LOOKS):
            step = round(part * self.steps)
            if STEPS_BETWEEN_LOOKS <= step <= found[-1] - STEPS_BETWEEN_LOOKS:
                found.append(step)
        return frozenset(found)


def distill_settings(tune: TuneOptions, seed: int) -> DistillConfig:
    """Settings of the stage, from what the user asked for."""
    return DistillConfig(
        steps=tune.distill_steps,
        lr=tune.distill_lr,
        codes_stay=tune.distill_scales_only,
        seed=seed,
    )


def rows_of_step(seqlen: int) -> int:
    """How many rows a step sees: about `STEP_TOKENS` tokens, one row at least."""
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


def take_step(
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    moments: dict[str, Tensor],
    rates: Mapping[str, Rate],
    *,
    step: int,
    config: DistillConfig,
) -> None:
    """Move what is learned by Adam (arXiv 1412.6980, algorithm 1); what has no gradient in it stays.

    Args:
        values: parameters, changed in place.
        gradients: of some of them.
        moments: `mean.NAME`, `square.NAME` and `usual.NAME`, the usual length, of each parameter's gradient;
            made at its first step and changed in place.
        rates: of each parameter.
        step: steps taken before.
        config: how far steps go.
    """
    for name, gradient in gradients.items():
        value, rate = values[name], rates[name]
        for kind in ("mean", "square"):
            if f"{kind}.{name}" not in moments:
                moments[f"{kind}.{name}"] = torch.zeros_like(value)
        both = moments[f"mean.{name}"], moments[f"square.{name}"]
        moments[f"usual.{name}"] = _shorten(gradient, moments.get(f"usual.{name}"))
        size = config.factor(step) * rate.size
        if rate.relative:  # the step from 0 is the same in units of the parameter
            moved = torch.zeros_like(value)
            _step_of_adam(moved, gradient, both, step, size)
            value.addcmul_(value, moved)
        else:
            _step_of_adam(value, gradient, both, step, size)


def _shorten(gradient: Tensor, usual: Tensor | None) -> Tensor:
    """Shorten a gradient that is far longer than those before, in place.

    A few rows of real models have gradients ten and more times as long as all others, where attention misses
    its sink. Unshortened one of them decides ten steps, and makes the next hundred small.

    Args:
        gradient: of one parameter.
        usual: usual length, a scalar; None at the first step.

    Returns:
        What is usual now.
    """
    length: Tensor = torch.linalg.vector_norm(gradient)
    if usual is None:
        return length
    known = usual > 0  # experts may see no token for a while
    kept = torch.where(known, torch.minimum(length, LONGEST * usual), length)
    gradient.mul_(torch.where(length > 0, kept / length, 1.0))
    return torch.where(
        known & (length > 0), torch.lerp(usual, kept, 1 - BETAS[0]), torch.maximum(usual, kept)
    )


def _step_of_adam(
    value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, size: float
) -> None:
    """One step, by PyTorch's own program in one pass over memory where it has one for the device."""
    mean, square = moments
    adam(
        [value],
        [gradient],
        [mean],
        [square],
        [],
        [torch.tensor(float(step), dtype=torch.float32, device=value.device)],
        fused=value.device.type in FUSED,
        foreach=False,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=size,
        weight_decay=0.0,
        eps=TINY,
        maximize=False,
    )
