"""What a run's memory and time follow from, and the sizes of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from auto_round.config.memory import MemoryOptions
from auto_round.facts.layer import Role
from auto_round.models.source import ModelSource
from auto_round.numerics.format import Format
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.distill import DistillConfig

TRAFFIC = 8
"""Times that a forward pass moves what the backward pass would keep of it: norms, attention, activations."""


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
        formats: quantized layer -> its format.
        elsewhere: layer -> its device, where that is not the one where blocks are tuned.
        ahead: where the next blocks' targets are computed while others are tuned; None for nowhere.
        output_bytes: all output folders together.
        compiled: the tuning step is compiled.
        rounds_inputs: what quantized layers are multiplied by is rounded, too.
        smooths: channels are evened out first, in float32.
        together: settings of tuning all blocks together; None where that is not asked for.
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
    formats: Mapping[str, Format]
    output_bytes: int
    elsewhere: Mapping[str, torch.device] = field(default_factory=dict)
    ahead: torch.device | None = None
    compiled: bool = False
    rounds_inputs: bool = False
    smooths: bool = False
    together: DistillConfig | None = None

    @property
    def quantized(self) -> int:
        """Weights that are quantized."""
        return sum(layer.weights for layer in self.source.layers if layer.name in self.formats)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the run holds in memory, bytes, and how many tokens it sees.

    Attributes:
        tokens: tokens of all rows; 0 without data.
        batch_tokens: tokens of a whole batch.
        stream: hidden states of all rows between two blocks, and what blocks hand on beside them.
        block: weights of the largest block in the compute dtype.
        block_weights: weights in the largest block.
        outside: embeddings, head and other tensors outside the blocks, in the compute dtype.
    """

    tokens: int
    batch_tokens: int
    stream: int
    block: int
    block_weights: int
    outside: int


def measure_sizes(work: Workload) -> Sizes:
    """Sizes of a run from its settings and the shapes of the model."""
    source, rows, itemsize = work.source, work.rows, work.dtype.itemsize
    blocks: dict[int, int] = {}
    for layer in source.layers:
        if layer.block is not None:
            blocks[layer.block] = blocks.get(layer.block, 0) + layer.weights
    largest = max(blocks.values(), default=0) * work.nblocks
    total = sum(spec.count for spec in source.tensors.values())
    return Sizes(
        tokens=rows * work.seqlen,
        batch_tokens=min(work.tune.batch_size, max(1, rows)) * work.seqlen,
        stream=rows * row_bytes(source, work.seqlen, work.dtype) if rows else 0,
        block=largest * itemsize,
        block_weights=largest,
        outside=max(0, total - sum(blocks.values())) * itemsize,
    )


def row_bytes(source: ModelSource, length: int, dtype: torch.dtype) -> int:
    """What is kept of a row of some tokens between two blocks, bytes."""
    return length * source.facts.flowing * dtype.itemsize + source.handed_on(length, dtype)


def active_share(source: ModelSource) -> float:
    """Share of the experts that a token passes through; all where none is told apart, as in Llama 4."""
    chosen, experts = source.facts.chosen_experts, [a for a in source.layers if a.role is Role.EXPERT]
    numbers = {layer.expert for layer in experts} - {None}
    if not chosen or not numbers or not all(map(source.tells_experts_apart, {a.parameter for a in experts})):
        return 1.0
    return min(1.0, chosen / len(numbers))


def active_weights(work: Workload) -> float:
    """Weights in all blocks that one token meets."""
    share = active_share(work.source)
    inside = [layer for layer in work.source.layers if layer.block is not None]
    return sum(a.weights * (share if a.role is Role.EXPERT else 1.0) for a in inside)


def moved_by_token(work: Workload) -> float:
    """Bytes that a forward pass through all blocks moves for a token, beside the weights."""
    share = active_share(work.source)
    widths: dict[int, float] = {}
    for layer in work.source.layers:
        if layer.block is not None:
            part = share if layer.role is Role.EXPERT else 1.0
            widths[layer.block] = widths.get(layer.block, 0.0) + part * sum(layer.shape)
    facts = work.source.facts
    kept = max(widths.values(), default=0.0) * 2 + 8 * facts.width + facts.heads * work.seqlen
    return kept * work.dtype.itemsize * TRAFFIC * len(work.source.blocks)
