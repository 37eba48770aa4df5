"""A run planned for machines that are not at hand, from the declared figures of their accelerators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from auto_round.facts.layer import Role
from auto_round.pipeline.fitting.accelerators import (
    BANDWIDTH_REACHED,
    DISK,
    NETWORK,
    NODE,
    PRODUCTS_REACHED,
    Machines,
)
from auto_round.pipeline.fitting.choose import Room, make_plan
from auto_round.pipeline.fitting.plan import MemoryPlan
from auto_round.pipeline.fitting.work import Workload, active_share
from auto_round.tuning.steps import batch_rows
from auto_round.units import duration, size

GRADIENT = 4
"""Bytes of a weight's gradient between ranks: float32."""

Spread = Callable[[int], dict[str, torch.device]]
"""Layers that lie elsewhere when the matrices of each block are spread over so many accelerators."""
Seconds = Callable[[Workload, MemoryPlan, float, float], float]
"""Time of a run at a rate of products, and of moved bytes."""


@dataclass(frozen=True, slots=True)
class Paper:
    """What a run would take on other machines.

    Attributes:
        machines: which.
        plan: memory of the main accelerator, or of each rank.
        ranks: processes, one an accelerator, that divide the rows of a step; 1 where the matrices of a block
            are spread over accelerators instead.
        spread: accelerators over which they are spread.
        blocks: how many the model has.
        read: bytes read from disk.
        written: bytes of the output.
        exchanged: bytes that each accelerator sends to others.
        seconds: wall time.
    """

    machines: Machines
    plan: MemoryPlan
    ranks: int
    spread: int
    blocks: int
    read: float
    written: float
    exchanged: float
    seconds: float

    @property
    def largest_other(self) -> int:
        """Most bytes that any but the main accelerator holds."""
        return max((held for stage in self.plan.stages for held in stage.others.values()), default=0)

    @property
    def fits(self) -> bool:
        """Whether every accelerator has enough memory."""
        return max(self.plan.device_bytes, self.largest_other) <= self.plan.device_room

    @property
    def text(self) -> str:
        """The plan for people."""
        name, each = f"{self.machines.count} x {self.machines.name}", self.machines.each
        how = f"{self.ranks} ranks, one an accelerator (torchrun)" if self.ranks > 1 else "one process"
        if self.spread > 1:
            how += f", matrices of a block spread over {self.spread} accelerators"
        largest = max(self.plan.device_bytes, self.largest_other)
        verdict = "" if self.fits else ": TOO LITTLE (experts that one tensor holds stay on one accelerator)"
        per_block = self.seconds / max(1, self.blocks)
        lines = (
            f"{name}, on paper: {how}; {self.plan.level.text}",
            f"memory:  at most {size(largest)} of {size(each.nbytes)} an accelerator{verdict}; "
            f"{size(self.plan.host_bytes * self.ranks)} of host memory in all",
            f"moved:   {size(self.read)} read, {size(self.written)} written, "
            f"{size(self.exchanged)} sent by each accelerator",
            f"time:    about {duration(self.seconds)}, {duration(per_block)} a block",
            f"assumed: {PRODUCTS_REACHED:.0%} of {each.products / 1e12:.4g} TFLOP/s in bfloat16 and "
            f"{BANDWIDTH_REACHED:.0%} of {each.bandwidth / 1e12:.3g} TB/s ({each.source}); "
            f"{size(each.link)}/s between neighbours, {size(NETWORK)}/s between machines, "
            f"{size(DISK)}/s from disk",
        )
        return "\n".join(lines)


def on_paper(work: Workload, machines: Machines, spread: Spread, seconds: Seconds) -> Paper:
    """Plan a run: by ranks where a block fits one accelerator, else spread over those of one machine.

    The closing check, which loads the whole output on one device, is left out.

    Args:
        work: the run.
        machines: what to plan for.
        spread: where layers lie when they are spread.
        seconds: time at given rates.
    """
    half = torch.float16 if work.source.dtype is torch.float16 else torch.bfloat16
    alone = replace(work, device=torch.device("cuda"), dtype=half, elsewhere={}, reloads=False)
    room = Room(0, 0, int(machines.each.nbytes))
    plan, ranks, over = make_plan(alone, room), machines.count, 1
    if not plan.fits and machines.count > 1:
        ranks, over = 1, machines.inside
        alone = replace(alone, elsewhere=spread(over))
        plan = make_plan(alone, room)
    each = machines.each
    rows = max(batch_rows(work.tune, step) for step in range(max(1, work.tune.iters))) if work.rows else 1
    products = PRODUCTS_REACHED * each.products * min(ranks, rows)
    moving = BANDWIDTH_REACHED * each.bandwidth * over
    exchanged = _exchanged(alone, ranks, over)
    between = each.link if max(ranks, over) <= NODE else NETWORK
    specs = work.source.tensors.values()
    read = float(sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in specs))
    took = seconds(alone, plan, products, moving) + exchanged / between
    blocks = len(work.source.blocks)
    return Paper(
        machines, plan, ranks, over, blocks, read, work.output_bytes, exchanged, max(took, read / DISK)
    )


def _exchanged(work: Workload, ranks: int, over: int) -> float:
    """Bytes that an accelerator sends: gradients of each step to other ranks, or what flows to matrices."""
    steps = float(work.tune.iters * work.tune.accumulate)
    if ranks > 1:
        return 2 * GRADIENT * work.quantized * steps * (ranks - 1) / ranks
    if over == 1:
        return 0.0
    share = active_share(work.source)
    there = (layer for layer in work.source.layers if layer.name in work.elsewhere)
    widths = sum(sum(a.shape) * (share if a.role is Role.EXPERT else 1.0) for a in there)
    tokens = 2.0 * work.seqlen * (work.rows + steps * work.tune.batch_size)  # both ways, or both passes
    return widths * tokens * work.dtype.itemsize / over
