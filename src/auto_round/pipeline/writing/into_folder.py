"""The output folder of a run: found finished, or worked in and sealed; then its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.checkpoint.workfolder import OutputFolder
from auto_round.config.groups import OutputOptions
from auto_round.log import logger
from auto_round.report.make import make_page
from auto_round.report.record import REPORT


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """What lies under the name of the output.

    Attributes:
        folder: the output.
        report: what its `report.json` says.
        earlier: an earlier run with the same settings made it, and nothing was done.
    """

    folder: Path
    report: Mapping[str, Any]
    earlier: bool


def into_folder(
    out: Path,
    wanted: OutputOptions,
    asked: str,
    work: Callable[[OutputFolder], Mapping[str, Any]],
    *,
    source: Path | None,
) -> FinishedOutput:
    """Do the work of a run in its output folder, unless an earlier run did; draw the page that is asked for.

    Args:
        out: final folder.
        wanted: whether an output there is replaced, a killed run is continued, a page is drawn.
        asked: digest of the request, by which an output that is there is known.
        work: writes everything and returns the report; finds what a killed run left.
        source: folder of the model, which is never replaced; None for one in memory.

    Raises:
        AutoRoundError: see its subclasses; nothing half-valid is left under the output's name.
    """
    with OutputFolder.open(out, overwrite=wanted.overwrite, source=source) as folder:
        earlier = folder.holds(asked)
        if earlier:
            folder.abandon()
            report = _earlier_report(folder.out)
        else:
            if not wanted.resume:
                folder.discard()
            report = work(folder)
            folder.seal(asked)
    if wanted.report:
        make_page([folder.out])
    return FinishedOutput(folder.out, report, earlier)


def _earlier_report(out: Path) -> Mapping[str, Any]:
    """What an earlier run reported; tells the user that nothing is done."""
    logger.warning(
        "%s is finished already, with the same settings: nothing was done (to do it again: --overwrite, in "
        "Python overwrite=True)",
        out,
    )
    report: Mapping[str, Any] = json.loads((out / REPORT).read_bytes())
    return report
