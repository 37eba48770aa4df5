"""A run planned for machines that are not at hand, from the declared figures of their accelerators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from auto_round.facts.layer import Role
from auto_round.pipeline.fitting.accelerators import (
    BANDWIDTH_REACHED,
    DISK,
    NETWORK,
    PRODUCTS_REACHED,
    Machines,
)
from auto_round.pipeline.fitting.choose import Room, choose_plan
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
        ranks: processes that divide the rows of a step.
        spread: accelerators over which each of them spreads the matrices of a block.
        blocks: how many the model has.
        read: bytes read from disk.
        written: bytes of the output.
        exchanged: bytes that each accelerator sends to others.
        seconds: wall time.
        left: accelerators that the run leaves alone: all blocks are tuned together on one.
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
    left: int = 0

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
        how = f"{self.ranks} ranks (torchrun)" if self.ranks > 1 else "one process"
        if self.left:
            how += (
                f" on one accelerator, for all blocks learn together on one (distill_steps): {self.left} idle"
            )
        if self.spread > 1:
            how += f", matrices of a block spread over {self.spread} accelerators"
            how += " each" if self.ranks > 1 else ""
        largest = max(self.plan.device_bytes, self.largest_other)
        verdict = "" if self.fits else ": TOO LITTLE"
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
    """Plan a run: the way that fits and cuts blocks into fewest pieces.

    Ranks divide the rows of a step, and each spreads the matrices of a block over 1, 2, 4 or 8 accelerators
    of one machine. Where nothing fits, it is spread as far as possible, and that is said. A run that tunes
    all blocks together takes one accelerator, as it does where there are several. The closing check, which
    loads the whole output on one device, is left out.

    Args:
        work: the run.
        machines: what to plan for.
        spread: where layers lie when they are spread.
        seconds: time at given rates.
    """
    half = torch.float16 if work.source.dtype is torch.float16 else torch.bfloat16
    alone = replace(work, device=torch.device("cuda"), dtype=half, elsewhere={}, reloads=False)
    room = Room(0, 0, int(machines.each.nbytes))
    if work.together is not None:
        one = replace(machines, count=1)
        found = _one_way(alone, one, choose_plan(alone, room), 1, seconds)
        return replace(found, machines=machines, left=machines.count - 1)
    over = 1
    while True:
        placed = replace(alone, elsewhere=spread(over)) if over > 1 else alone
        found = _one_way(placed, machines, choose_plan(placed, room), over, seconds)
        over *= 2
        if found.fits or over > machines.inside:
            return found


def _one_way(alone: Workload, machines: Machines, plan: MemoryPlan, over: int, seconds: Seconds) -> Paper:
    """The run with a block spread over so many accelerators, by as many ranks as that leaves."""
    work, each, ranks = alone, machines.each, max(1, machines.count // over)
    rows = max(batch_rows(work.tune, step) for step in range(max(1, work.tune.iters))) if work.rows else 1
    products = PRODUCTS_REACHED * each.products * min(ranks, rows)
    moving = BANDWIDTH_REACHED * each.bandwidth * over
    rows_moved, gradients = _flowing(alone, ranks, over), _gradients(alone, ranks, over)
    between = each.link if machines.nodes == 1 else NETWORK
    specs = work.source.tensors.values()
    read = float(sum(spec.nbytes for spec in specs))
    took = seconds(alone, plan, products, moving) + rows_moved / each.link + gradients / between
    blocks = len(work.source.blocks)
    return Paper(
        machines,
        plan,
        ranks,
        over,
        blocks,
        read,
        work.output_bytes,
        rows_moved + gradients,
        max(took, read / DISK),
    )


def _gradients(work: Workload, ranks: int, over: int) -> float:
    """Bytes that an accelerator sends to other ranks: gradients of each step of what it holds."""
    steps = float(work.tune.iters * work.tune.accumulate)
    return 2 * GRADIENT * work.quantized * steps * (ranks - 1) / ranks / over


def _flowing(work: Workload, ranks: int, over: int) -> float:
    """Bytes that an accelerator sends within its rank: what flows to matrices, and back."""
    if over == 1:
        return 0.0
    steps = float(work.tune.iters * work.tune.accumulate)
    share = active_share(work.source)
    there = (layer for layer in work.source.layers if layer.name in work.elsewhere)
    widths = sum(sum(a.shape) * (share if a.role is Role.EXPERT else 1.0) for a in there)
    tokens = 2.0 * work.seqlen * (work.rows + steps * work.tune.batch_size)  # both ways, or both passes
    return widths * tokens * work.dtype.itemsize / over / min(ranks, work.tune.batch_size)
