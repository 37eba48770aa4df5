"""From the user's options to the settings of the tuning loop."""

from __future__ import annotations

from dataclasses import replace

from auto_round.config.tuning import TuneOptions
from auto_round.tuning.config import Optimizer, TuneConfig

PLAIN_FROM_BITS = 8
"""From this width on `iters=0` does not search ranges unless asked: nothing measurable would be gained."""


def without_tuning(tune: TuneOptions) -> TuneOptions:
    """The same for a run that has nothing to tune: no steps, no search, so no rows."""
    return replace(tune, iters=0, disable_opt_rtn=True, enable_alg_ext=False, distill_steps=0, smooth=None)


def tune_settings(tune: TuneOptions, bits: int) -> TuneConfig:
    """Settings of the tuning loop.

    Args:
        tune: what the user asked for.
        bits: fewest bits of any quantized layer; the default step size depends on them.
    """
    asked = tune.disable_opt_rtn
    plain = tune.iters == 0 and (bits >= PLAIN_FROM_BITS if asked is None else asked)
    adam = tune.enable_adam
    rate = tune.lr if adam or not tune.iters else tune.learning_rate(bits)
    return TuneConfig(
        iters=tune.iters,
        batch_size=tune.batch_size,
        by_row=tune.enable_deterministic_algorithms,
        accumulate=tune.gradient_accumulate_steps,
        optimizer=Optimizer.ADAM if adam else Optimizer.SIGN,
        lr=rate,
        range_lr=tune.minmax_lr,
        schedule=tune.lr_scheduler,
        momentum=tune.momentum,
        search=not plain,
        tune_range=tune.enable_minmax_tuning,
        tune_norm_bias=tune.enable_norm_bias_tuning,
        keep_best=not tune.not_use_best_mse,
        patience=max(0, tune.dynamic_max_gap),
        smooths=bool(tune.smooth),
        keeps_offsets=tune.distill_steps > 0,
    )
