"""What a run writes to the disk of its output, and whether there is room for it."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from auto_round.checkpoint.disk import reading
from auto_round.checkpoint.workfolder import OutputFolder
from auto_round.errors import ConfigError
from auto_round.pipeline.deciding.fit import plan_memory, workload
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.fitting.plan import MemoryPlan
from auto_round.pipeline.fitting.states import flowing_bytes, states_on_disk
from auto_round.pipeline.fitting.work import Workload, measure_sizes
from auto_round.units import size

SAVED_STREAMS = 4
"""Hidden states of all rows that are saved at a time: two streams, behind a block and behind the next one."""
SPILLED_STREAMS = 3
"""The same in files instead of memory: two streams, and the targets."""
BLOCK_BYTES = 512
"""Unit of `st_blocks`, whatever the file system's own blocks are (stat(2))."""


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """What a run writes. All of it lies on one file system: the scratch folder is beside the output.

    Attributes:
        output: all output folders together, bytes.
        saved: hidden states behind finished blocks, from which a killed run continues, bytes.
        spilled: hidden states that do not fit into memory, bytes.
        together: states of tuning all blocks together, bytes.
    """

    output: int
    saved: int = 0
    spilled: int = 0
    together: int = 0

    @property
    def scratch(self) -> int:
        """What goes away when the run is finished, bytes."""
        return self.saved + self.spilled + self.together

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.output + self.scratch

    @property
    def parts(self) -> str:
        """What takes how much, for people."""
        named = {
            "finished blocks": self.saved,
            "hidden states in files": self.spilled,
            "states of distill_steps": self.together,
        }
        inside = [f"{name} {size(count)}" for name, count in named.items() if count]
        until = f"{size(self.scratch)} until it is finished" + (f": {', '.join(inside)}" if inside else "")
        return f"{size(self.output)} output, {until}"


def disk_need(work: Workload, plan: MemoryPlan) -> DiskNeed:
    """What a run will write; nothing is read but shapes.

    Args:
        work: the run.
        plan: its memory plan.
    """
    stream, stage = measure_sizes(work).stream, work.together
    spilled = SPILLED_STREAMS * stream if plan.files else 0
    if plan.files and stage is not None:
        units, row = math.ceil(len(work.source.blocks) / work.nblocks), stream // max(1, work.rows)
        spilled += flowing_bytes(units, row, work.seqlen, work.held_out, stage.steps)
    return DiskNeed(
        output=work.output_bytes,
        saved=SAVED_STREAMS * stream if work.continues else 0,
        spilled=spilled,
        together=0 if stage is None else states_on_disk(work.quantized, codes_stay=stage.codes_stay),
    )


def free_bytes(path: Path) -> int:
    """Free space where a path that may not exist yet would be, bytes."""
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    with reading(there):
        return shutil.disk_usage(there).free


def refuse_full_disk(job: Job, folder: OutputFolder) -> None:
    """Refuse to begin, or to go on, where the disk has no room for output and scratch.

    Args:
        job: the run.
        folder: where it writes; what an interrupted run left there is not needed again.

    Raises:
        ConfigError: there is too little.
    """
    work = workload(job)
    need = disk_need(work, job.memory_plan or plan_memory(job))
    free = free_bytes(folder.partial)
    more = need.total - _held_bytes(folder.partial)
    if more <= free:
        return
    folder.abandon()
    remedies = ["free some space", "choose an output folder on another disk (for quantize(): AR_WORK_SPACE)"]
    if work.together is not None and not work.together.codes_stay:
        least = states_on_disk(work.quantized, codes_stay=True)
        remedies.append(f"leave distill_steps out or give distill_scales_only ({size(least)})")
    if need.saved or need.spilled:
        remedies.append("take fewer or shorter rows (nsamples, seqlen)")
    raise ConfigError(
        f"{folder.partial}: this run writes {size(need.total)} there ({need.parts})"
        f"{'' if more == need.total else f', {size(more)} of it still'}, but its disk has {size(free)} free: "
        f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
    )


def _held_bytes(folder: Path) -> int:
    """What the files of a folder take of its disk, bytes; their length where the system does not tell."""
    with reading(folder):
        found = [path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(BLOCK_BYTES * getattr(file, "st_blocks", -(-file.st_size // BLOCK_BYTES)) for file in found)
