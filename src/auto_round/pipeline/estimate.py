"""Estimates of a run's time, from shapes and a short measurement of this machine; memory is the plan's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from auto_round.numerics.search import THOROUGH
from auto_round.pipeline.distilling.cost import stage_seconds
from auto_round.pipeline.fitting.plan import MemoryPlan
from auto_round.pipeline.fitting.work import Sizes, Workload, active_weights, measure_sizes, moved_by_token
from auto_round.tuning.steps import held_out_looks, rows_seen

ROUNDING_BYTES = 800
"""Bytes moved for each weight in one tuning step: rounding, its gradient and the update in float32 (fitted
to runs of an 8-million-weight model on one core, like the next two)."""
SEARCH_BYTES = 200
"""Bytes moved for each weight and candidate range of the search."""
PASSES_WITH_GRADIENTS = 3
"""Forward passes that cost as much as one with gradients; each takes two operations a weight and token."""
HEAD_PASSES = 3
"""Products with the head where predictions are compared: the original's, the block's, and its gradient."""
MEASURED_TOKENS = 4096
"""Most rows of the matrix product that is timed."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured speed of the device that tunes.

    Attributes:
        operations: floating-point operations per second of a matrix product in the compute dtype.
        bandwidth: bytes per second of an elementwise operation in float32.
    """

    operations: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run is expected to take.

    Attributes:
        host_bytes: peak resident memory of the process.
        device_bytes: peak memory on the accelerator; 0 when the CPU tunes.
        seconds: wall time.
        together: seconds of it that tuning all blocks together takes; 0 where it is not asked for.
    """

    host_bytes: int
    device_bytes: int
    seconds: float
    together: float


def estimate(work: Workload, plan: MemoryPlan, rates: Rates) -> RunEstimate:
    """Estimate a run; nothing is read but shapes.

    Args:
        work: the run.
        plan: its memory plan.
        rates: measured speed of the device.
    """
    sizes = measure_sizes(work)
    together = stage_seconds(work, plan.level, rates.operations, rates.bandwidth)
    return RunEstimate(
        host_bytes=plan.host_bytes,
        device_bytes=plan.device_bytes,
        seconds=_seconds(work, sizes, rates) + together,
        together=together,
    )


def operations(work: Workload, sizes: Sizes) -> float:
    """Floating-point operations with the weights: reference and quantized pass, tuning steps, and looks."""
    ends = 0.0
    if work.by_predictions:
        facts = work.source.facts
        seen = rows_seen(work.tune) * work.seqlen
        ends = HEAD_PASSES * float(seen) * facts.vocabulary * facts.width
    return 2 * (active_weights(work) * _passes(work, sizes) + ends)


def measure_rates(work: Workload, seconds: float = 0.4) -> Rates:
    """Time a matrix product of the job's shapes, and an elementwise operation, for a moment.

    Args:
        work: the run.
        seconds: how long in all; one of each is always timed.
    """
    shapes = [layer.shape for layer in work.source.layers if layer.block is not None]
    out, width = max(shapes, key=math.prod, default=(1024, 1024))
    tokens = max(1, min(work.tune.batch_size * work.seqlen, MEASURED_TOKENS))
    hidden = torch.ones(tokens, width, dtype=work.dtype, device=work.device)
    weight = torch.ones(out, width, dtype=work.dtype, device=work.device)
    vector = torch.ones(1 << 22, dtype=torch.float32, device=work.device)
    product = _fastest(lambda: hidden @ weight.T, seconds / 2, work.device)
    elementwise = _fastest(lambda: vector + vector, seconds / 2, work.device)
    return Rates(2 * tokens * out * width / product, 12 * vector.numel() / elementwise)


def _fastest(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Seconds of the fastest of as many calls as fit into the time, after one to warm up."""
    work()
    best, began = math.inf, time.perf_counter()
    while best is math.inf or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _passes(work: Workload, sizes: Sizes) -> float:
    """Tokens that go through all blocks; those with gradients count `PASSES_WITH_GRADIENTS` times."""
    if not sizes.tokens:
        return 0.0
    passes = 2.0 * sizes.tokens
    if work.tune.iters:
        passes += PASSES_WITH_GRADIENTS * min(
            rows_seen(work.tune) * work.seqlen,
            work.tune.iters * work.tune.accumulate * sizes.batch_tokens,
        )
        looks = 1 + len(held_out_looks(work.tune))
        passes += looks * work.held_out * work.seqlen
    return passes


def _seconds(work: Workload, sizes: Sizes, rates: Rates) -> float:
    """Arithmetic with the weights, and what is moved for rounding, searching and between operations."""
    moved = work.quantized * 4.0 * work.source.dtype.itemsize
    if sizes.tokens:
        candidates = THOROUGH.points + 3 * THOROUGH.rounds if work.tune.search else 0
        moved += work.quantized * SEARCH_BYTES * (candidates if not work.tune.iters else candidates // 4)
    if sizes.tokens and work.tune.iters:
        moved += work.quantized * ROUNDING_BYTES * float(work.tune.iters)
    moved += _passes(work, sizes) * moved_by_token(work)
    return operations(work, sizes) / rates.operations + moved / rates.bandwidth
