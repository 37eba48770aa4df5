"""Estimates of memory, disk and time, from shapes alone and a short measurement of this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from auto_round.config.groups import MemoryOptions
from auto_round.facts.layer import Layer, Role
from auto_round.models.source import ModelSource
from auto_round.numerics.search import THOROUGH
from auto_round.pipeline.machine.memory import peak_bytes
from auto_round.pipeline.running.last_block import logits_budget
from auto_round.pipeline.running.streams import Home, home_of_streams
from auto_round.tuning.config import TuneConfig
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a run's cost follows from.

    Attributes:
        source: the model, of which shapes are read.
        tune: settings of the tuning loop.
        device: where blocks are tuned.
        dtype: dtype in which blocks run.
        memory: what to save memory at the cost of time.
        rows: calibration rows, those held out too; 0 without data.
        held_out: how many of them judge and are not tuned on.
        seqlen: tokens of a row.
        nblocks: blocks tuned as one.
        by_predictions: the last block is tuned by what the model predicts.
        reloads: what was written is loaded and compared.
        continues: streams are saved, so that a killed run can continue.
        quantized: weights that are quantized.
        output_bytes: all output folders together.
    """

    source: ModelSource
    tune: TuneConfig
    device: torch.device
    dtype: torch.dtype
    memory: MemoryOptions
    rows: int
    held_out: int
    seqlen: int
    nblocks: int
    by_predictions: bool
    reloads: bool
    continues: bool
    quantized: int
    output_bytes: int


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


def estimate(work: Workload, rates: Rates) -> Estimate:
    """Estimate a run; nothing is read but shapes."""
    sizes = measure_sizes(work)
    home = _home(work, sizes)
    tuning = _tuning_bytes(work, sizes)
    if work.by_predictions:
        tuning += sizes.outside + logits_budget(work.device, sparing=work.memory.low_gpu_mem_usage)
    rest = sizes.outside + (work.output_bytes if work.reloads and sizes.tokens else 0)
    on_device = work.device.type != "cpu"
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
        output_bytes=work.output_bytes,
        scratch_bytes=_scratch(work, sizes),
        seconds=_seconds(work, sizes, rates),
    )


def operations(work: Workload, sizes: Sizes) -> float:
    """Floating-point operations with the weights: reference and quantized pass, tuning steps, and looks."""
    ends = 0.0
    if work.by_predictions:
        facts = work.source.facts
        seen = rows_seen(work.tune) * work.seqlen
        ends = HEAD_PASSES * float(seen) * facts.vocabulary * facts.width
    return 2 * (active_weights(work) * _passes(work, sizes) + ends)


def active_weights(work: Workload) -> float:
    """Weights in all blocks that one token meets."""
    share = _active_share(work)
    inside = [layer for layer in work.source.layers if layer.block is not None]
    return sum(math.prod(a.shape) * (share if a.role is Role.EXPERT else 1.0) for a in inside)


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


def measure_sizes(work: Workload) -> Sizes:
    """Sizes of a run from its settings and the shapes of the model."""
    source, rows, itemsize = work.source, work.rows, work.dtype.itemsize
    blocks: dict[int, int] = {}
    for layer in source.layers:
        if layer.block is not None:
            blocks[layer.block] = blocks.get(layer.block, 0) + math.prod(layer.shape)
    batch = min(work.tune.batch_size, max(1, rows))
    largest = max(blocks.values(), default=0) * work.nblocks
    total = sum(math.prod(spec.shape) for spec in source.tensors.values())
    return Sizes(
        tokens=rows * work.seqlen,
        batch_tokens=batch * work.seqlen,
        pass_tokens=min(work.tune.pass_rows, batch) * work.seqlen,
        stream=rows * work.seqlen * source.facts.width * itemsize,
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


def _tuning_bytes(work: Workload, sizes: Sizes) -> int:
    """Memory while the largest block is worked on."""
    own = work.source.dtype
    copies = sizes.block + (sizes.block_weights * own.itemsize if own is not work.dtype else 0)
    if not sizes.tokens:
        largest = max((math.prod(layer.shape) for layer in work.source.layers), default=0)
        return largest * 16
    activations = _activations(work, sizes)
    if not work.tune.iters:
        return copies + sizes.block_weights + activations // 4
    buffers = 8 if work.tune.optimizer.value == "adam" else 4 if work.tune.momentum else 0
    return copies + sizes.block_weights * (TUNING_BYTES + buffers) + activations


def _activations(work: Workload, sizes: Sizes) -> int:
    """What the backward pass through the largest block keeps, bytes."""
    facts = work.source.facts
    share = _active_share(work)
    widths: dict[int, float] = {}
    for layer in work.source.layers:
        if layer.block is not None:
            part = share if layer.role is Role.EXPERT else 1.0
            widths[layer.block] = widths.get(layer.block, 0.0) + part * sum(layer.shape)
    length, heads = work.seqlen, facts.heads
    each = max(widths.values(), default=0.0) * 2 + 8 * facts.width + heads * length
    return int(sizes.pass_tokens * each * work.dtype.itemsize * work.nblocks)


def _home(work: Workload, sizes: Sizes) -> Home:
    return home_of_streams(work.memory, work.device, 2 * sizes.stream)


def _scratch(work: Workload, sizes: Sizes) -> int:
    """Both streams before and after a block, and with the targets those that back the memory."""
    saved = 4 * sizes.stream if work.continues else 0
    return saved + (3 * sizes.stream if _home(work, sizes).files else 0)


def _active_share(work: Workload) -> float:
    """Share of the experts that a token passes through."""
    chosen = work.source.facts.chosen_experts
    experts = _experts(work.source.layers)
    return min(1.0, chosen / experts) if chosen and experts else 1.0


def _experts(layers: Sequence[Layer]) -> int:
    found = {layer.expert for layer in layers if layer.role is Role.EXPERT and layer.expert is not None}
    return len(found)


def _passes(work: Workload, sizes: Sizes) -> float:
    """Tokens that go through all blocks; those whose gradients are wanted count `PASSES` times."""
    if not sizes.tokens:
        return 0.0
    passes = 2.0 * sizes.tokens
    if work.tune.iters:
        passes += PASSES * min(
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
    kept = _activations(work, sizes) / sizes.pass_tokens / work.nblocks
    moved += _passes(work, sizes) * kept * TRAFFIC * len(work.source.blocks)
    return operations(work, sizes) / rates.operations + moved / rates.bandwidth
