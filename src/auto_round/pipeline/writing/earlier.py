"""A run that an earlier one has done already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from auto_round.log import logger
from auto_round.report.make import make_page
from auto_round.report.record import REPORT


def earlier_report(out: Path, *, page: bool) -> dict[str, Any]:
    """What `report.json` of an earlier run with the same settings says; tells the user that nothing is done.

    Args:
        out: the folder of that run.
        page: whether the page of the run is wanted.
    """
    logger.warning(
        "%s is finished already, with the same settings: nothing was done (to do it again: --overwrite, in "
        "Python overwrite=True)",
        out,
    )
    report: dict[str, Any] = json.loads((out / REPORT).read_bytes())
    if page:
        make_page([out])
    return report
