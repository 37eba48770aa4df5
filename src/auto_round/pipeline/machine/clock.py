"""Time and memory of a run, and the estimate of what is left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from auto_round.log import Progress, ProgressSink
from auto_round.pipeline.machine.memory import peak_bytes

COUNTED = ("tune", "distill")
"""Stages whose events come at even intervals, so that the time left follows."""


class Clock:
    """Wall time of a run and of its stages, and the time that is left; starts when made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._counting_since: float | None = None
        self._skipped = 0
        self._lap = self._start
        self._stages: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Wall time since the run began."""
        return time.perf_counter() - self._start

    @property
    def peak(self) -> int:
        """Peak resident memory of the process, bytes."""
        return peak_bytes()

    @property
    def stages(self) -> Mapping[str, float]:
        """Wall seconds of each stage so far, in their order."""
        return dict(self._stages)

    def lap(self, stage: str) -> float:
        """Count the time since the last lap for a stage, and return it in seconds."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        self._stages[stage] = self._stages.get(stage, 0.0) + seconds
        return seconds

    @contextmanager
    def stage(self, stage: str, label: str, progress: ProgressSink) -> Iterator[None]:
        """A stage that is one piece of work: an event before it and one behind it."""
        progress(self.event(stage, 0, 1, label))
        yield
        self.lap(stage)
        progress(self.event(stage, 1, 1, label))

    def skip(self, units: int) -> None:
        """Tell that this many units of the stage that begins were done in an earlier run."""
        self._skipped, self._counting_since = units, self.seconds

    def event(
        self,
        stage: str,
        done: int,
        total: int,
        label: str,
        *,
        loss: float | None = None,
        initial: float | None = None,
    ) -> Progress:
        """A progress event, with the time left while tuning."""
        if stage not in COUNTED:
            self._counting_since = self.seconds
        fresh = done - self._skipped
        left = None
        if stage in COUNTED and fresh > 0 and self._counting_since is not None:
            left = (self.seconds - self._counting_since) / fresh * (total - done)
        return Progress(
            stage,
            done,
            total,
            label,
            loss=None if loss is None or loss != loss else loss,
            initial_loss=None if initial is None or initial != initial else initial,
            seconds=self.seconds,
            seconds_left=left,
            peak_bytes=self.peak,
        )
