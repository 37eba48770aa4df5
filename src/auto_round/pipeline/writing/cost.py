"""What a run cost: times and memory, kept apart from what it gave."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from auto_round.checkpoint.disk import atomic_write_json, writing
from auto_round.checkpoint.journal import Journal
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.machine.description import machine, versions
from auto_round.pipeline.machine.memory import device_peak_bytes, peak_bytes, resident_bytes
from auto_round.pipeline.writing.command import command_of
from auto_round.report.record import RUN_RECORD, RunRecord, UnitCost
from auto_round.version import __version__

COST = "cost"
"""Key of a unit's cost in the journal; it never reaches `report.json`, which equal runs write equal."""


def cost_of(unit: str, seconds: float, device: torch.device, lowered: str = "") -> dict[str, Any]:
    """What a unit cost that took so long and is finished now, as JSON values; see `UnitCost`."""
    held, peak = resident_bytes(), peak_bytes()
    return asdict(UnitCost(unit, round(seconds, 3), held, peak, device_peak_bytes(device), lowered))


def run_record(job: Job, journal: Journal, clock: Clock, *, continued: bool) -> RunRecord:
    """What the whole run cost, and how to repeat it.

    Args:
        job: the run.
        journal: has what each unit cost, also those of earlier processes.
        clock: of this process.
        continued: earlier processes did a part.
    """
    command, beside = command_of(job.options)
    if job.source.folder is None:
        beside = [f"a model in memory ({_class_of(job)})", *beside]
    return RunRecord(
        command=command,
        beside_command=beside,
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(clock.seconds, 3),
        continued=continued,
        stages={stage: round(seconds, 3) for stage, seconds in clock.stages.items()},
        peak_bytes=clock.peak,
        device=job.device.type,
        units=tuple(UnitCost(**entry[COST]) for entry in journal.entries if COST in entry),
        machine=machine(job.device),
        versions={
            "auto_round": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **versions(),
        },
        memory={} if job.memory_plan is None else job.memory_plan.to_json(),
    )


def write_record(root: Path, record: RunRecord) -> None:
    """Write what a run cost, once for all formats, below a folder that will become the output."""
    atomic_write_json(root / RUN_RECORD, record.to_json())


def carry_record(finished: Path, root: Path) -> None:
    """Take the record of a run over to another output of it.

    Args:
        finished: folder of one format of the run.
        root: folder that will become the output.
    """
    found = [folder / RUN_RECORD for folder in (finished, finished.parent) if (folder / RUN_RECORD).is_file()]
    for record in found[:1]:
        with writing(root / RUN_RECORD):
            shutil.copyfile(record, root / RUN_RECORD)


def _class_of(job: Job) -> str:
    return type(job.source.config).__name__.removesuffix("Config")
