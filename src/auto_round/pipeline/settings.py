"""From the user's options to the request for a plan and the settings of the tuning loop."""

from __future__ import annotations

from collections.abc import Mapping

from auto_round.config.groups import SchemeOptions, TuneOptions
from auto_round.schemes.plan import PlanRequest
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.tuning.config import Optimizer, TuneConfig

PLAIN_FROM_BITS = 8
"""From this width on, `iters=0` rounds plainly unless asked: a search gains nothing that can be measured."""


def plan_request(wanted: SchemeOptions, scale_dtype: str | None = None) -> PlanRequest:
    """What the user asked of the plan.

    Args:
        wanted: the user's options.
        scale_dtype: dtype of scales where the user names none; None for the scheme's own.
    """
    overrides = wanted.overrides()
    if scale_dtype is not None and not _names_scale_dtype(wanted):
        overrides["scale_dtype"] = scale_dtype
    return PlanRequest(
        scheme=wanted.scheme,
        overrides=overrides,
        layer_config=wanted.layer_config,
        ignore_layers=wanted.ignore_layers or None,
        quant_lm_head=wanted.quant_lm_head,
        to_quant_block_names=wanted.to_quant_block_names or None,
    )


def _names_scale_dtype(wanted: SchemeOptions) -> bool:
    """Whether the user chose a dtype of scales; the default of a scheme object is no choice."""
    if wanted.scale_dtype is not None:
        return True
    if isinstance(wanted.scheme, QuantizationScheme):
        return wanted.scheme.scale_dtype != QuantizationScheme().scale_dtype
    return isinstance(wanted.scheme, Mapping) and "scale_dtype" in wanted.scheme


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
    )
