"""What a run cost and how to repeat it: `report_run.json`, the one record that differs between equal runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

REPORT = "report.json"
"""What a run gave: equal runs write equal files."""
RUN_RECORD = "report_run.json"
"""What it cost: times, memory, machine and command."""
CHOSEN_PLAN = "auto_scheme.json"
"""What AutoScheme chose; `--layer_config` takes it back."""
SENSITIVITY = "sensitivity"
"""Key of `report.json` under which is said how much each layer minds being rounded."""
DISTILLED = "distillation"
"""Key under which is said what tuning all blocks together gave."""
EVALUATION_SUFFIX = ".evaluation.json"
"""End of the name of the file beside a folder that says how good it is, see `auto-round eval`."""
PAGE = "report.html"
"""All of it as a page."""


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Time and memory of one unit of work: a block, or neighbouring blocks tuned as one.

    Attributes:
        unit: name of the block on disk.
        seconds: wall time, from the unit before to the moment at which this one was on disk.
        resident_bytes: host memory held when the unit was done; 0 where the system does not say.
        peak_bytes: peak of it so far, since the process began.
        device_peak_bytes: peak of memory on the accelerator so far; 0 on a host.
        lowered: how it was tuned, where memory had ended before; empty where the run went as planned.
    """

    unit: str
    seconds: float
    resident_bytes: int
    peak_bytes: int
    device_peak_bytes: int = 0
    lowered: str = ""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """`report_run.json`. Paths of the command are those of the machine on which the run was made.

    Attributes:
        command: shell command that repeats the run.
        beside_command: what the run was given that no command can say (objects of Python), for people.
        finished: time at which it ended, UTC, ISO 8601.
        seconds: wall time of the process that finished the run.
        continued: an earlier process did some of the units; their times are in `units`, not in `seconds`.
        stages: stage -> wall seconds: "prepare", "smooth", "trace", "round", "tune", "distill", "measure",
            "write", "verify".
        peak_bytes: peak resident memory of the process, bytes.
        device: what blocks were tuned on: "cpu", "cuda".
        units: cost of each unit, in order; empty for plain rounding, whose units overlap.
        machine: processor, accelerator and settings, see `pipeline.machine.description`.
        versions: package -> version.
        memory: what was planned before the first block, to be held against `peak_bytes`, see
            `pipeline.fitting.plan.MemoryPlan.to_json`.
    """

    command: str
    beside_command: Sequence[str]
    finished: str
    seconds: float
    continued: bool
    stages: Mapping[str, float]
    peak_bytes: int
    device: str
    units: Sequence[UnitCost] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` gives back an equal record."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunRecord:
        """The record that `to_json` wrote.

        Raises:
            TypeError: a field is missing, or there is one of a later version.
        """
        return cls(**{**values, "units": tuple(UnitCost(**unit) for unit in values["units"])})
