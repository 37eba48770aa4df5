"""Sensitivities of all parts, measured or found on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from auto_round.autoscheme import by_divergence, by_first_order, by_gradients
from auto_round.autoscheme.kept_scores import KeptScores, open_scores
from auto_round.autoscheme.parts import Part, ScoringSetting, find_parts
from auto_round.autoscheme.smoothed import smoothed, smoothing_facts
from auto_round.autoscheme.unscored import with_typical
from auto_round.config import cache_folder
from auto_round.config.auto_scheme import FIRST_ORDER
from auto_round.errors import NumericsError
from auto_round.log import ProgressSink, logger
from auto_round.models.fingerprint import model_fingerprint
from auto_round.pipeline.machine.clock import Clock
from auto_round.version import __version__

METHODS = MappingProxyType(
    {"fisher": by_gradients.measure, "kl": by_divergence.measure, FIRST_ORDER: by_first_order.measure}
)
"""Ways to measure by name; docs/LOG.md compares them."""

MEASURED_AS = 3
"""Version of the ways to measure; scores of another are measured again."""

Scores = Mapping[Part, list[float]]
"""Part -> loss of each option, nats per token."""


def measured_scores(setting: ScoringSetting, method: str, progress: ProgressSink, clock: Clock) -> Scores:
    """Scores of all parts for all options; of parts that nothing depends on, what is typical (`unscored`).

    Args:
        setting: what is measured, and on what.
        method: key of `METHODS`.
        progress: receives an event for each part.
        clock: of the run.

    Raises:
        NumericsError: a weight or a score is not finite; names the layers.
    """
    plans = setting.candidates.plans
    parts = find_parts(setting.candidates)
    root = cache_folder() / "scores"
    with open_scores(root, _signature(setting, method)) as kept:
        found = {part: scores for part in parts if (scores := kept.find(part, plans)) is not None}
        left = [part for part in parts if part not in found]
        if found:
            logger.info("AutoScheme: %d of %d sensitivities are known from %s", len(found), len(parts), root)
        if left:
            _measure(setting, method, left, kept, found, progress, clock)
    return with_typical(setting, {part: found[part] for part in parts})


def _measure(
    setting: ScoringSetting,
    method: str,
    left: list[Part],
    kept: KeptScores,
    found: dict[Part, list[float]],
    progress: ProgressSink,
    clock: Clock,
) -> None:
    total = len(left) + len(found)
    progress(clock.event("score", len(found), total, setting.job.rows.summary if setting.job.rows else ""))
    setting = smoothed(setting, kept.scratch, progress, clock)
    for part, scores in METHODS[method](setting, left, kept.scratch):
        _refuse_not_finite(setting, part, scores)
        kept.keep(part, setting.candidates.plans, scores)
        found[part] = scores
        progress(clock.event("score", len(found), total, part.layers[0]))
    kept.finish()


def _refuse_not_finite(setting: ScoringSetting, part: Part, scores: list[float]) -> None:
    for label, score in zip(setting.candidates.labels, scores, strict=True):
        if not math.isfinite(score):
            raise NumericsError(
                f"{', '.join(part.layers[:3])} under {label}: the sensitivity is {score}; expected a finite "
                "number: the model's own outputs on these rows, or the rounded weights, are not finite"
            )


def _signature(setting: ScoringSetting, method: str) -> dict[str, Any]:
    """What scores depend on beside the layers and schemes."""
    job = setting.job
    return {
        "auto_round": __version__,
        "measured_as": MEASURED_AS,
        "method": method,
        "model": model_fingerprint(job.source),
        "rows": None if job.rows is None else job.rows.fingerprint,
        "seed": job.options.calibration.seed,
        "search": setting.search,
        "smooth": smoothing_facts(setting),
        "dtype": str(job.dtype),
        "device": job.device.type,
    }
