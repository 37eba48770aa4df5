"""What a run returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.schemes.plan import Plan


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        folders: output folders in the order of the formats.
        plan: what became of every layer.
        report: what `report.json` says: sizes in bytes, losses, perplexities, KL, versions, seeds.
        seconds: wall time of the whole run.
        peak_bytes: peak resident memory of the process.
    """

    folders: tuple[Path, ...]
    plan: Plan
    report: Mapping[str, Any]
    seconds: float
    peak_bytes: int
