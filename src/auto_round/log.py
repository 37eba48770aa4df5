"""One logger, and progress as events that a callback receives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger("auto_round")


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a long job.

    Attributes:
        stage: "load", "calibrate", "smooth", "tune", "distill", "write", "verify"; "show" of a pipeline;
            "original", "floor", "compare" of an evaluation.
        done: finished units of this stage.
        total: all units of this stage.
        label: what was just finished, for example a block's name.
        loss: block loss after the unit, where there is one.
        initial_loss: block loss before tuning (plain rounding), where there is one.
        seconds: wall time since the job began.
        seconds_left: estimate for the rest of the job; None while unknown.
        peak_bytes: peak resident memory of the process so far, bytes.
    """

    stage: str
    done: int
    total: int
    label: str = ""
    loss: float | None = None
    initial_loss: float | None = None
    seconds: float = 0.0
    seconds_left: float | None = None
    peak_bytes: int = 0


ProgressSink = Callable[[Progress], None]


def ignore_progress(event: Progress) -> None:
    """Sink that drops every event."""
