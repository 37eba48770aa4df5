"""Settings of the tuning loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from auto_round.config.tuning import check_step_size
from auto_round.errors import ConfigError


class Optimizer(Enum):
    """How a gradient becomes a step."""

    SIGN = "sign"
    ADAM = "adam"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """Settings of `tune_block`.

    Attributes:
        iters: optimizer steps; 0 returns the starting point (plain or searched rounding).
        batch_size: samples whose mean loss is differentiated.
        growing_batch: use fewer of them in earlier steps, see `steps.batch_rows`.
        rows_at_once: most samples in one pass through the block; a larger batch is cut, which saves memory
            and changes nothing else. 0 passes whole batches.
        by_row: pass rows one at a time, and add up what they give in an order that depends on nothing but
            their places in the batch: any number of processes then comes to the same bits.
        accumulate: batches in one step.
        optimizer: sign descent or Adam.
        lr: step size of the rounding offsets, in units of the quantization step; None for the
            optimizer's own default.
        range_lr: step size of the range multipliers; None for one that follows `lr` and the grid of each
            weight, see `steps.range_rate`.
        schedule: factor of the step size for `(step, iters)`; None for linear decay to 0 (sign descent) or
            half a cosine (Adam).
        momentum: of sign descent; 0 for none.
        search: start from the range found by an importance-weighted search instead of the measured one.
        tune_rounding: learn rounding offsets.
        tune_range: learn range multipliers.
        tune_norm_bias: also learn the block's norm weights and biases.
        keep_best: return the best parameters seen on the held-out samples, else the last ones.
        try_cancelled: with `keep_best`, also try codes whose errors cancel, see `worth_cancelling`.
        ranges: what flows into layers fixes numbers of their formats; tuning itself does not look at this.
        smooths: large channels of inputs are divided first, by what rows show (`numerics.smoothing`); tuning
            itself does not look at this.
        keeps_offsets: return the offsets and knobs of each weight too, where a later stage goes on from them.
        patience: stop after this many steps without a better held-out loss, which is looked at ten times in a
            run; 0 never stops early.
    """

    iters: int = 200
    batch_size: int = 8
    growing_batch: bool = True
    rows_at_once: int = 0
    by_row: bool = False
    accumulate: int = 1
    optimizer: Optimizer = Optimizer.SIGN
    lr: float | None = None
    range_lr: float | None = None
    schedule: Callable[[int, int], float] | None = None
    momentum: float = 0.0
    search: bool = True
    tune_rounding: bool = True
    tune_range: bool = True
    tune_norm_bias: bool = False
    keep_best: bool = True
    try_cancelled: bool = True
    ranges: bool = False
    smooths: bool = False
    keeps_offsets: bool = False
    patience: int = 0

    @property
    def needs_rows(self) -> bool:
        """Whether rows are needed: for tuning, the weighted search, what flows in, or a later stage."""
        return self.iters > 0 or self.search or self.ranges or self.smooths or self.keeps_offsets

    @property
    def pass_rows(self) -> int:
        """Most samples in one pass through the block."""
        return 1 if self.by_row else self.rows_at_once or self.batch_size

    def __post_init__(self) -> None:
        for name, least in (
            ("iters", 0),
            ("batch_size", 1),
            ("rows_at_once", 0),
            ("accumulate", 1),
            ("patience", 0),
        ):
            value = int(getattr(self, name))
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        check_step_size("lr", self.lr)
        check_step_size("minmax_lr (range_lr)", self.range_lr)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.iters and not (self.tune_rounding or self.tune_range or self.tune_norm_bias):
            raise ConfigError("nothing is left to tune: tune rounding or ranges, or set iters=0")
        if self.iters and self.schedule is not None:
            _try_schedule(self.schedule, self.iters)


def _try_schedule(schedule: Callable[[int, int], float], iters: int) -> None:
    """Refuse what is no function of the step, such as a class of `torch.optim.lr_scheduler`.

    Raises:
        ConfigError: it cannot be called so, or gives no finite number.
    """
    try:
        factor = float(schedule(0, iters))
    except Exception as error:
        raise ConfigError(
            "lr_scheduler must be a function of (step, iters) that gives the factor of lr, such as "
            f"lambda step, iters: 1 - step / iters; this one gives {type(error).__name__}: {error}. "
            "PyTorch's schedulers go with its optimizers, which are not used here"
        ) from error
    if not math.isfinite(factor):
        raise ConfigError(f"lr_scheduler gives {factor} at step 0; expected the factor of lr")
