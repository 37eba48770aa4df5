"""Third step of a job: the plan, the exporters that write it, and the settings of the tuning loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auto_round.config.tuning import TuneOptions
from auto_round.export.exporter import Exporter
from auto_round.log import logger
from auto_round.pipeline.deciding.activations import activation_formats, refuse_unreachable, to_calibrate
from auto_round.pipeline.deciding.caches import plan_caches, with_scales
from auto_round.pipeline.deciding.kept_dtype import named_dtype
from auto_round.pipeline.deciding.open_model import Opened
from auto_round.pipeline.deciding.placement import Placement, place_layers, refuse_together
from auto_round.pipeline.deciding.plan_together import plan_together
from auto_round.pipeline.deciding.request import Request
from auto_round.pipeline.machine.device import compute_dtype
from auto_round.schemes.attention import AttentionPlan
from auto_round.schemes.plan import Plan
from auto_round.schemes.vocabulary import KEPT_BITS
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.settings import tune_settings, without_tuning


@dataclass(frozen=True, slots=True)
class Decided:
    """What becomes of every layer, and how.

    Attributes:
        plan: scheme of every layer.
        exporters: format name -> exporter with its variant decided.
        importance: tensor in the source -> mean square of its inputs `[in]`, from a file; empty without one.
        wanted: what the user asked of tuning; plain rounding where nothing is quantized.
        tune: settings of the tuning loop.
        dtype: dtype in which blocks run.
        caches: which scales of the key/value cache and of attention are calibrated; None for none.
        placement: where the layers are worked on.
    """

    plan: Plan
    exporters: Mapping[str, Exporter]
    importance: Mapping[str, Tensor]
    wanted: TuneOptions
    tune: TuneConfig
    dtype: torch.dtype
    caches: AttentionPlan | None
    placement: Placement


def decide(request: Request, opened: Opened, *, quiet: bool = False) -> Decided:
    """Make the plan, ask the formats for refusals, and settle how layers are rounded.

    A format with a planner of its own makes the plan; all others of a run share one.

    Args:
        request: what is asked for.
        opened: the model.
        quiet: a trial, of which the user hears nothing but refusals.

    Raises:
        UnsupportedError: a format cannot hold the plan, the model cannot be quantized as asked, or experts
            that must stay together would not.
        ConfigError: a rule, a name in `device_map` or an option that cannot be carried out.
    """
    options = opened.options
    planners = (planner for exporter in request.formats if (planner := exporter.planner) is not None)
    planned = next(planners, plan_together)(opened.source, opened.tokenizer, options, request.formats)
    plan = planned.plan
    for note in () if quiet else planned.notes:
        logger.warning(note)
    refuse_unreachable(plan, opened.source)
    schemes = [plan.scheme_of(name) for name in plan.quantized]
    caches = plan_caches(options.cache, opened.source)
    wanted = options.tune if schemes or caches is not None else without_tuning(options.tune)
    if not schemes and caches is None and not quiet:
        logger.info("nothing is quantized, so no block is tuned and no calibration data is needed")
    tune = tune_settings(wanted, min((s.bits for s in schemes if s is not None), default=KEPT_BITS))
    exporters = with_scales(planned.exporters, caches)
    ranges = bool(to_calibrate(activation_formats(plan, opened.source.layers))) or caches is not None
    tune = replace(tune, ranges=ranges)
    for exporter in exporters.values():
        exporter.check(options, request.output, calibrated=tune.needs_rows)
    placement = place_layers(request.devices, opened.source, plan)
    refuse_together(placement, wanted.distill_steps)
    own = named_dtype(options.model.model_dtype) or opened.source.dtype
    return Decided(
        plan=plan,
        exporters=exporters,
        importance=planned.importance,
        wanted=wanted,
        tune=tune,
        dtype=compute_dtype(own, request.device, amp=options.tune.amp),
        caches=caches,
        placement=placement,
    )
