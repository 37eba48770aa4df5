"""How a model was quantized, in the words of reports, model cards and configurations."""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.config.groups import CalibrationOptions
from auto_round.config.options import Options
from auto_round.config.tuning import TuneOptions
from auto_round.export.exporter import TuningFacts
from auto_round.tuning.config import TuneConfig


@dataclass(frozen=True, slots=True)
class Method:
    """What a finished folder tells of its making.

    Attributes:
        sentence: one line for people.
        facts: options of tuning and its data that differ from the defaults.
        seed: of every random choice.
        dataset: names of the calibration data, as the user gave them.
        model: name or folder of the model, as the user gave it; None for one in memory.
    """

    sentence: str
    facts: TuningFacts
    seed: int
    dataset: str
    model: str | None


def method_of(options: Options, tune: TuneConfig, *, with_rows: bool, strength: float = 0.0) -> Method:
    """What a run with these options will tell.

    Args:
        options: what the user asked for.
        tune: settings of the tuning loop.
        with_rows: some rows are there to tune on, or to weigh a search by.
        strength: of smoothing; 0 where the model was not rescaled.
    """
    return Method(
        sentence=smoothing_words(strength)
        + _sentence(tune, with_rows=with_rows, by_predictions=options.tune.enable_alg_ext)
        + _stage(options.tune),
        facts=_facts(options.tune, options.calibration),
        seed=options.calibration.seed,
        dataset=options.said_dataset,
        model=options.model.model,
    )


def smoothing_words(strength: float) -> str:
    """How the sentence begins where inputs are smoothed; empty elsewhere."""
    return f"large channels of inputs divided (smoothing, strength {strength:g}), then " if strength else ""


def _stage(tune: TuneOptions) -> str:
    if not tune.distill_steps:
        return ""
    return f", then {tune.distill_steps} steps of all blocks together by the model's predictions"


def _sentence(tune: TuneConfig, *, with_rows: bool, by_predictions: bool) -> str:
    if tune.iters and with_rows:
        last = ", the last one by the model's predictions" if by_predictions else ""
        return f"SignRound, {tune.iters} steps of {tune.optimizer.value} descent a block{last}"
    if tune.search:
        found = "round to nearest in a range searched by importance"
        return found if with_rows else "round to nearest, searched range"
    return "plain round to nearest"


def _facts(tune: TuneOptions, calibration: CalibrationOptions) -> TuningFacts:
    found: dict[str, bool | int | float | str | None] = {}
    for group, default in ((tune, TuneOptions()), (calibration, CalibrationOptions())):
        for name in default.__dataclass_fields__:
            value = getattr(group, name)
            told = isinstance(value, (bool, int, float, str)) and name != "dataset"
            if told and value != getattr(default, name):
                found[name] = value
    return found
