"""What is measured is the model that a run rounds: smoothed (`numerics.smoothing`), where the run will do so.

A run smooths after its plan is chosen, and only layers that gain (`pipeline.deciding.smoothing`). Here the
plan is not known yet, so every layer counts that gains under one of the options.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from auto_round.autoscheme.parts import ScoringSetting
from auto_round.log import ProgressSink
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.smoothing import gains, rounds_inputs, strength_of
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.running.smooth import find_changes, with_changes


def smoothing_facts(setting: ScoringSetting) -> dict[str, Any] | None:
    """What the factors of all channels follow from beside model and rows, as JSON values; None for none.

    Scores of another smoothed model are not those of this one, even where strengths agree: other options may
    smooth other layers, or by another formula.
    """
    job = _gaining(setting)
    if not (strength := strength_of(job)):
        return None
    names = sorted(job.plan.entries)
    return {
        "strength": strength,
        "gain": [name for name in names if gains(job.plan, name)],
        "round_inputs": [name for name in names if rounds_inputs(job.plan, name)],
    }


def smoothed(setting: ScoringSetting, scratch: Path, progress: ProgressSink, clock: Clock) -> ScoringSetting:
    """The same setting on the rescaled model, which is the same function; itself where nothing is smoothed.

    Args:
        setting: what is measured, and on what.
        scratch: folder that keeps the factors for a measurement that is continued.
        progress: receives an event for each block.
        clock: of the run.
    """
    job = _gaining(setting)
    if not strength_of(job):
        return setting
    rescaled = with_changes(job, find_changes(job, scratch, progress, clock))
    return replace(setting, job=replace(rescaled, plan=setting.job.plan))


def _gaining(setting: ScoringSetting) -> Job:
    """The job, with a plan that gives each layer an option under which it gains, if any."""
    job, plans = setting.job, setting.candidates.plans
    entries = {
        name: next((plan.entries[name] for plan in plans if gains(plan, name)), entry)
        for name, entry in job.plan.entries.items()
    }
    return replace(job, plan=replace(job.plan, entries=entries))
