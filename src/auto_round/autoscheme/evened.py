"""What is measured is the model that a run rounds: with channels of inputs evened out, where it does that.

A run smooths after its plan is chosen, and only layers whose inputs gain (`pipeline.deciding.smoothing`).
Here the plan is not known yet, so every layer counts that gains under one of the options.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from auto_round.autoscheme.parts import Setting
from auto_round.log import ProgressSink
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.smoothing import gains, strength_of
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.running.smooth import find_changes, with_changes


def strength(setting: Setting) -> float:
    """Strength of smoothing of a run that mixes the options; 0 for none."""
    return strength_of(_gaining(setting))


def evened(setting: Setting, scratch: Path, progress: ProgressSink, clock: Clock) -> Setting:
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


def _gaining(setting: Setting) -> Job:
    """The job, with a plan that gives each layer an option under which its inputs gain, if any."""
    job, plans = setting.job, setting.candidates.plans
    entries = {
        name: next((plan.entries[name] for plan in plans if gains(plan, name)), entry)
        for name, entry in job.plan.entries.items()
    }
    return replace(job, plan=replace(job.plan, entries=entries))
