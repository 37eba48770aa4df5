"""Which level a run begins with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from auto_round.config.memory import MemoryOptions
from auto_round.pipeline.fitting.demand import stages_of
from auto_round.pipeline.fitting.level import MemoryLevel, StreamPlace, levels_of, starts_at
from auto_round.pipeline.fitting.plan import MemoryPlan
from auto_round.pipeline.fitting.work import Workload, measure_sizes

UNKNOWN_ROOM = 4 << 30
"""Room for hidden states where the system does not tell what is free, bytes."""
STREAMS_SHARE = 0.5
"""Hidden states may take this share of the host memory that the rest of the run leaves."""
RELOADED = 2
"""A folder is loaded for the closing check where so many times its size is free."""
DEVICE_SHARE = 0.95
"""Share of an accelerator's memory that a plan may fill."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that a plan may count on.

    Attributes:
        held: what the process holds already, bytes.
        host: host memory that is free, bytes; 0 where the system does not tell.
        device: memory of the accelerator in all, bytes, so that equal machines decide alike whatever else
            runs there; 0 without one and where nobody tells.
    """

    held: int
    host: int
    device: int


def choose_plan(work: Workload, room: Room) -> MemoryPlan:
    """The plan of a run at the first level that fits, as far as the user leaves it to us.

    On a host the number of rows at once is never changed for memory that happens to be free: equal runs give
    equal bytes.
    """
    levels = levels_of(work.device, work.tune.batch_size, work.seqlen)
    start = starts_at(levels, work.memory)
    on_host = work.device.type == "cpu"
    plan = _plan(work, levels, start, room)
    for lower in range(start + 1, len(levels)):
        if plan.fits or (on_host and levels[lower].rows != levels[start].rows):
            break
        plan = _plan(work, levels, lower, room)
    return plan


def _plan(work: Workload, levels: tuple[MemoryLevel, ...], chosen: int, room: Room) -> MemoryPlan:
    level = levels[chosen]
    skipped = room.host and RELOADED * work.output_bytes > room.host  # it is said then
    stages = stages_of(replace(work, reloads=False) if skipped else work, level)
    streams = 3 * measure_sizes(work).stream
    on_host = work.device.type == "cpu" or level.streams is not StreamPlace.DEVICE
    whole = MemoryPlan(levels, chosen, stages, room.held, False, room.host, int(DEVICE_SHARE * room.device))
    left = room.host - whole.beside_streams if room.host else None
    return replace(whole, files=on_host and wants_files(level, work.memory, streams, left))


def wants_files(level: MemoryLevel, memory: MemoryOptions, nbytes: int, room: int | None) -> bool:
    """Whether hidden states on the host are backed by files.

    Args:
        level: how the run goes.
        memory: what the user asked for.
        nbytes: of all hidden states.
        room: host memory that the rest of the run leaves, bytes; None where the system does not tell.
    """
    if level.streams is StreamPlace.FILES:
        return nbytes > 0
    left = UNKNOWN_ROOM if room is None else room
    return memory.low_cpu_mem_usage and nbytes > STREAMS_SHARE * left
