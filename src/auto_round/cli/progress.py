"""Progress events drawn: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from auto_round.log import Progress, ProgressSink
from auto_round.units import duration, gain, size

VERBS = {
    "load": "reading",
    "calibrate": "calibrating",
    "score": "measuring sensitivity",
    "smooth": "smoothing",
    "tune": "tuning",
    "distill": "distilling",
    "write": "writing",
    "verify": "verifying",
    "original": "running the original",
    "floor": "measuring the noise floor",
    "compare": "running the model",
    "show": "drawing",
}
SECONDS_BETWEEN_LINES = 10.0
"""Plain lines of stages that report often are at least this far apart; blocks are always shown."""


def event_line(event: Progress) -> str:
    """Say in one line what was just finished, with loss, time left and peak memory."""
    parts = [f"{_verb(event)} {event.done}/{event.total}"]
    if event.label:
        parts.append(event.label)
    if event.loss is not None:
        before = event.initial_loss
        parts.append("loss " + (f"{event.loss:.4g}" if before is None else gain(before, event.loss)))
    if event.seconds_left is not None:
        parts.append(f"{duration(event.seconds_left)} left")
    if event.peak_bytes:
        parts.append(f"peak {size(event.peak_bytes)}")
    return "  ".join(parts)


@contextmanager
def drawn_progress(stream: TextIO | None = None) -> Iterator[ProgressSink]:
    """Give a sink that draws events on `stream` (stderr) until the block ends."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _bar(stream) as sink:
            yield sink
    else:
        yield plain_lines(stream)


def plain_lines(stream: TextIO) -> ProgressSink:
    """Give a sink that writes a line per finished block, and now and then for the rest."""
    last = ("", float("-inf"))

    def show(event: Progress) -> None:
        nonlocal last
        soon = event.stage == last[0] and event.seconds - last[1] < SECONDS_BETWEEN_LINES
        if soon and event.loss is None and event.done < event.total:
            return
        last = (event.stage, event.seconds)
        stream.write(event_line(event) + "\n")
        stream.flush()

    return show


@contextmanager
def _bar(stream: TextIO) -> Iterator[ProgressSink]:
    """A bar for the running stage; finished blocks scroll by above it."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(file=stream)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("starting", total=None, note="")

        def show(event: Progress) -> None:
            bars.update(
                task, description=_verb(event), completed=event.done, total=event.total, note=_note(event)
            )
            if event.loss is not None:
                console.print(event_line(event), markup=False, highlight=False)

        yield show


def _verb(event: Progress) -> str:
    """What is being done; a block without a loss was not tuned but rounded."""
    if event.stage == "tune" and event.loss is None:
        return "rounding"
    return VERBS.get(event.stage, event.stage)


def _note(event: Progress) -> str:
    left = f"{duration(event.seconds_left)} left" if event.seconds_left is not None else ""
    peak = f"peak {size(event.peak_bytes)}" if event.peak_bytes else ""
    return "  ".join(part for part in (left, peak) if part)
