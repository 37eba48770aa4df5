"""The record of what a run cost, and the page where it is asked for: once for all formats, at the top."""

from __future__ import annotations

import shutil
from pathlib import Path

from auto_round.checkpoint.disk import atomic_write_json, writing
from auto_round.report.make import draw_page
from auto_round.report.record import RUN_RECORD, RunRecord


def write_page(root: Path, record: RunRecord, *, label: str, drawn: bool) -> None:
    """Write both below a folder that already holds the report.

    Args:
        root: folder that will become the output.
        record: what the run cost.
        label: what the run is called.
        drawn: whether the page is asked for.
    """
    atomic_write_json(root / RUN_RECORD, record.to_json())
    if drawn:
        draw_page(root, label)


def carry_page(finished: Path, root: Path, *, label: str, drawn: bool) -> None:
    """Take the record of a run over to another output of it, and draw the page where it is asked for.

    Args:
        finished: folder of one format of the run.
        root: folder that will become the output; it holds the report.
        label: what the output is called.
        drawn: whether the page is asked for.
    """
    found = [folder / RUN_RECORD for folder in (finished, finished.parent) if (folder / RUN_RECORD).is_file()]
    for record in found[:1]:
        with writing(root / RUN_RECORD):
            shutil.copyfile(record, root / RUN_RECORD)
    if drawn:
        draw_page(root, label)
