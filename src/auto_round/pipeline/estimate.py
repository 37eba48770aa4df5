"""Estimates of memory, disk and time, from shapes alone and a short measurement of this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from auto_round.facts.layer import Layer, Role
from auto_round.pipeline.deciding.fetch_rows import held_out_rows
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.plan_table import manifests
from auto_round.pipeline.machine.memory import peak_bytes
from auto_round.pipeline.running.last_block import logits_budget
from auto_round.pipeline.running.streams import Home, home_of_streams
from auto_round.tuning.steps import held_out_looks, rows_seen

TUNING_BYTES = 25
"""Memory of a weight under tuning beside the model's own copy: offset, best offset so far and gradient in
float32 (12), what the backward pass of the rounding keeps (9), the rounded weight and its gradient (4)."""
ROUNDING_BYTES = 800
"""Bytes moved for each weight in one tuning step: rounding, its gradient and the update in float32 (fitted
to runs of an 8-million-weight model on one core, like the next two)."""
SEARCH_BYTES = 200
"""Bytes moved for each weight and candidate range of the search."""
PASSES = 3
"""Forward passes that cost as much as one with gradients; each takes two operations a weight and token."""
HEAD_PASSES = 3
"""Products with the head where predictions are compared: the original's, the block's, and its gradient."""
TRAFFIC = 8
"""Times that a forward pass moves what the backward pass would keep of it: norms, attention, activations."""
MEASURED_TOKENS = 4096
"""Most rows of the matrix product that is timed."""
WORKSPACE = 96 << 20
"""Logits, packed codes and what the C library keeps, bytes."""


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
class Sizes:
    """What the run holds in memory, bytes, and how many tokens it sees.

    Attributes:
        tokens: tokens of all rows; 0 without data.
        batch_tokens: tokens of a whole batch.
        pass_tokens: tokens that go through a block at once.
        stream: hidden states of all rows between two blocks.
        block: weights of the largest block in the compute dtype.
        block_weights: weights in the largest block.
        outside: embeddings, head and other tensors outside the blocks, in the compute dtype.
    """

    tokens: int
    batch_tokens: int
    pass_tokens: int
    stream: int
    block: int
    block_weights: int
    outside: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        host_bytes: peak resident memory of the process.
        device_bytes: peak memory on the accelerator; 0 when the CPU tunes.
        output_bytes: all output folders together.
        scratch_bytes: what lies beside them until the run ends: saved and spilled activations.
        seconds: wall time.
    """

    host_bytes: int
    device_bytes: int
    output_bytes: int
    scratch_bytes: int
    seconds: float


def estimate(job: Job, rates: Rates) -> Estimate:
    """Estimate a run; nothing is read but shapes."""
    sizes = measure_sizes(job)
    output = sum(m.nbytes for m in manifests(job).values())
    home = _home(job, sizes)
    tuning = _tuning_bytes(job, sizes)
    if job.options.tune.enable_alg_ext:
        tuning += sizes.outside + logits_budget(job)
    rest = sizes.outside + (output if job.options.output.verify and sizes.tokens else 0)
    on_device = job.device.type != "cpu"
    streams = 0 if home.files else 3 * sizes.stream  # with the targets
    tracing = sizes.outside + sizes.stream
    if home.device.type != "cpu":
        tuning += streams
        host = max(rest, tracing)
    else:
        host = max(rest, tracing, 0 if on_device else tuning) + streams
    return Estimate(
        host_bytes=peak_bytes() + WORKSPACE + host,
        device_bytes=max(tuning, rest) + WORKSPACE if on_device else 0,
        output_bytes=output,
        scratch_bytes=_scratch(job, sizes),
        seconds=_seconds(job, sizes, rates),
    )


def operations(job: Job, sizes: Sizes) -> float:
    """Floating-point operations with the weights: reference and quantized pass, tuning steps, and looks."""
    share = _active_share(job)
    inside = [layer for layer in job.source.layers if layer.block is not None]
    active = sum(math.prod(a.shape) * (share if a.role is Role.EXPERT else 1.0) for a in inside)
    ends = 0.0
    if job.options.tune.enable_alg_ext:
        facts = job.source.facts
        seen = rows_seen(job.tune) * job.options.calibration.seqlen
        ends = HEAD_PASSES * float(seen) * facts.vocabulary * facts.width
    return 2 * (active * _passes(job, sizes) + ends)


def measure_rates(job: Job, seconds: float = 0.4) -> Rates:
    """Time a matrix product of the job's shapes, and an elementwise operation, for a moment.

    Args:
        job: the run.
        seconds: how long in all; one of each is always timed.
    """
    shapes = [layer.shape for layer in job.source.layers if layer.block is not None]
    out, width = max(shapes, key=math.prod, default=(1024, 1024))
    tokens = max(1, min(job.tune.batch_size * job.options.calibration.seqlen, MEASURED_TOKENS))
    hidden = torch.ones(tokens, width, dtype=job.dtype, device=job.device)
    weight = torch.ones(out, width, dtype=job.dtype, device=job.device)
    vector = torch.ones(1 << 22, dtype=torch.float32, device=job.device)
    product = _fastest(lambda: hidden @ weight.T, seconds / 2, job.device)
    elementwise = _fastest(lambda: vector + vector, seconds / 2, job.device)
    return Rates(2 * tokens * out * width / product, 12 * vector.numel() / elementwise)


def measure_sizes(job: Job) -> Sizes:
    """Sizes of a run from its options and the shapes of the model."""
    source, wanted = job.source, job.options.calibration
    itemsize = job.dtype.itemsize
    rows = 0
    if job.rows is not None:
        rows = len(job.rows.rows)
    elif job.tune.needs_rows:
        rows = wanted.nsamples + held_out_rows(wanted.nsamples)
    blocks: dict[int, int] = {}
    for layer in source.layers:
        if layer.block is not None:
            blocks[layer.block] = blocks.get(layer.block, 0) + math.prod(layer.shape)
    members = max(1, job.options.tune.nblocks)
    batch = min(job.tune.batch_size, max(1, rows))
    largest = max(blocks.values(), default=0) * members
    total = sum(math.prod(spec.shape) for spec in source.tensors.values())
    return Sizes(
        tokens=rows * wanted.seqlen,
        batch_tokens=batch * wanted.seqlen,
        pass_tokens=min(job.tune.pass_rows, batch) * wanted.seqlen,
        stream=rows * wanted.seqlen * source.facts.width * itemsize,
        block=largest * itemsize,
        block_weights=largest,
        outside=max(0, total - sum(blocks.values())) * itemsize,
    )


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


def _tuning_bytes(job: Job, sizes: Sizes) -> int:
    """Memory while the largest block is worked on."""
    own = job.source.dtype
    copies = sizes.block + (sizes.block_weights * own.itemsize if own is not job.dtype else 0)
    if not sizes.tokens:
        largest = max((math.prod(layer.shape) for layer in job.source.layers), default=0)
        return largest * 16
    activations = _activations(job, sizes)
    if not job.tune.iters:
        return copies + sizes.block_weights + activations // 4
    buffers = 8 if job.tune.optimizer.value == "adam" else 4 if job.tune.momentum else 0
    return copies + sizes.block_weights * (TUNING_BYTES + buffers) + activations


def _activations(job: Job, sizes: Sizes) -> int:
    """What the backward pass through the largest block keeps, bytes."""
    facts = job.source.facts
    share = _active_share(job)
    widths: dict[int, float] = {}
    for layer in job.source.layers:
        if layer.block is not None:
            part = share if layer.role is Role.EXPERT else 1.0
            widths[layer.block] = widths.get(layer.block, 0.0) + part * sum(layer.shape)
    length, heads = job.options.calibration.seqlen, facts.heads
    each = max(widths.values(), default=0.0) * 2 + 8 * facts.width + heads * length
    return int(sizes.pass_tokens * each * job.dtype.itemsize * max(1, job.options.tune.nblocks))


def _home(job: Job, sizes: Sizes) -> Home:
    return home_of_streams(job.options.memory, job.device, 2 * sizes.stream)


def _scratch(job: Job, sizes: Sizes) -> int:
    """Both streams before and after a block, and with the targets those that back the memory."""
    saved = 4 * sizes.stream if job.options.output.resume else 0
    return saved + (3 * sizes.stream if _home(job, sizes).files else 0)


def _active_share(job: Job) -> float:
    """Share of the experts that a token passes through."""
    chosen = job.source.facts.chosen_experts
    experts = _experts(job.source.layers)
    return min(1.0, chosen / experts) if chosen and experts else 1.0


def _experts(layers: Sequence[Layer]) -> int:
    found = {layer.expert for layer in layers if layer.role is Role.EXPERT and layer.expert is not None}
    return len(found)


def _passes(job: Job, sizes: Sizes) -> float:
    """Tokens that go through all blocks; those whose gradients are wanted count `PASSES` times."""
    if not sizes.tokens:
        return 0.0
    passes = 2.0 * sizes.tokens
    if job.tune.iters:
        passes += PASSES * min(
            rows_seen(job.tune) * job.options.calibration.seqlen,
            job.tune.iters * job.tune.accumulate * sizes.batch_tokens,
        )
        looks = 1 + len(held_out_looks(job.tune))
        passes += looks * held_out_rows(job.options.calibration.nsamples) * job.options.calibration.seqlen
    return passes


def _seconds(job: Job, sizes: Sizes, rates: Rates) -> float:
    """Arithmetic with the weights, and what is moved for rounding, searching and between operations."""
    quantized = sum(math.prod(layer.shape) for layer, _ in job.quantized().values())
    moved = quantized * 4.0 * job.source.dtype.itemsize
    if sizes.tokens:
        candidates = 0 if job.effort is None else job.effort.points + 3 * job.effort.rounds
        moved += quantized * SEARCH_BYTES * (candidates if not job.tune.iters else candidates // 4)
    if sizes.tokens and job.tune.iters:
        moved += quantized * ROUNDING_BYTES * float(job.tune.iters)
    kept = _activations(job, sizes) / sizes.pass_tokens / max(1, job.options.tune.nblocks)
    moved += _passes(job, sizes) * kept * TRAFFIC * len(job.source.blocks)
    return operations(job, sizes) / rates.operations + moved / rates.bandwidth
