"""From folders of finished runs to a page on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round.checkpoint.record import add_to_record
from auto_round.errors import ConfigError
from auto_round.report.draw import require_plotting
from auto_round.report.one_run import page_of
from auto_round.report.page import render, write_html
from auto_round.report.pipeline_run import PIPELINE, page_of_pipeline
from auto_round.report.record import PAGE, REPORT
from auto_round.report.run import read_run
from auto_round.report.section import Page
from auto_round.report.several_runs import page_of_all


def make_page(places: Sequence[Path], file: Path | None = None) -> Path:
    """Write the page of a finished run, or one that compares several.

    Args:
        places: output folders of finished runs, or the `report.json` in them.
        file: where to; None for `report.html` in the folder of the one run.

    Returns:
        The file.

    Raises:
        ConfigError: a folder is not one of a finished run, a package is missing, no place for the page.
        CheckpointError: a record is damaged.
    """
    require_plotting()
    folders = [place.parent if place.name == REPORT else place for place in places]
    alone = len(folders) == 1
    if file is None and not alone:
        raise ConfigError("several runs are compared on a page of its own: name it (-o FILE.html)")
    target = folders[0] / PAGE if file is None else file
    write_html(target, render(_page(folders)))
    if file is None:
        add_to_record(folders[0], PAGE)
    return target


def _page(folders: Sequence[Path]) -> Page:
    """The page of one run, over a model or a pipeline, or of several runs over models."""
    labels = _labels(folders)
    of_pipelines = [report for folder in folders if PIPELINE in (report := _report(folder))]
    if of_pipelines and len(folders) > 1:
        raise ConfigError("runs over pipelines have no page that compares them: draw one for each")
    if of_pipelines:
        return page_of_pipeline(of_pipelines[0], folders[0])
    runs = [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]
    return page_of(runs[0]) if len(runs) == 1 else page_of_all(runs)


def _report(folder: Path) -> Mapping[str, Any]:
    """What a folder's report says; nothing where it cannot be read, which is said when it is."""
    try:
        found = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many of those above as tell them apart.

    Raises:
        ConfigError: a folder is there twice.
    """
    whole = [folder.resolve() for folder in folders]
    if twice := [folder for folder in whole if whole.count(folder) > 1]:
        raise ConfigError(f"{twice[0]} is named twice: name each run once")
    names = [folder.name for folder in whole]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(folder.parts[-depth:]) for folder in whole]
    return names
