"""What tuning all blocks together keeps besides a block: states of weights, and what flows between blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from auto_round.config.memory import MemoryOptions
from auto_round.pipeline.fitting.level import StreamPlace
from auto_round.tuning.distill import DistillConfig, rows_of_step

STATE_BYTES = 12
"""Of each weight: offset and two moments in float32."""
MOMENT_BYTES = 8
"""The moments of them."""
SPILL_BYTES = 2 << 30
"""States of all weights lie in files above this size, where memory is to be spared."""
CODES_BYTES = 2
"""Of each weight on disk where codes stay: its code, and its part of what is kept of a group (36 bytes)."""
KEPT_BYTES = 28
"""Of each weight on disk: states of the last durable step and of the one at hand, and the best offsets."""
STREAMS = 3
"""What is traced of rows: the original's stream, the rounded one's and room for targets."""
STAY_BYTES = 2 << 30
"""All units stay between the two sweeps of a step where they take no more and memory is to be spared."""
SOME_STAY_BYTES = 1 << 30
"""Most memory for the last units where not all stay. Few of many blocks save little time, and with 2 billion
weights 2 GiB of them made the stage's peak 2.5 times that of block tuning (docs/LOG.md)."""
AHEAD_BYTES = 64 << 20
"""Most memory for hidden states of rows that are traced ahead."""


def states_in_memory(config: DistillConfig, weights: int, memory: MemoryOptions) -> bool:
    """Whether the states of all blocks stay in host memory between two steps.

    Args:
        config: settings of the stage. Where codes stay, states are those of groups, and small.
        weights: how many are tuned.
        memory: what to save memory at the cost of time.
    """
    return config.codes_stay or STATE_BYTES * weights <= SPILL_BYTES or not memory.low_cpu_mem_usage


def staying_units(
    sizes: Sequence[int], memory: MemoryOptions, device: torch.device, streams: StreamPlace
) -> int:
    """How many of the last units stay in memory between the two sweeps of a step.

    What stays is run once, by attention that can be differentiated, whose last bits are others. So on a host
    it depends on nothing but the model and the options; an accelerator holds none where it has no room for
    hidden states either.

    Args:
        sizes: what each unit holds while it stays, bytes.
        memory: what to save memory at the cost of time.
        device: where blocks are tuned.
        streams: where hidden states lie at the level at which the run begins.
    """
    if memory.memory != "auto" or (device.type != "cpu" and streams is not StreamPlace.DEVICE):
        return 0
    if not memory.low_cpu_mem_usage and device.type == "cpu":
        return len(sizes)
    together = list(itertools.accumulate(reversed(sizes)))
    if together and together[-1] <= STAY_BYTES:
        return len(sizes)
    return sum(size <= SOME_STAY_BYTES for size in together)


def states_on_disk(quantized: int, *, codes_stay: bool) -> int:
    """What the states take of the disk until the run ends, bytes.

    Args:
        quantized: weights that are quantized.
        codes_stay: steps of groups are learned only.
    """
    return (CODES_BYTES if codes_stay else KEPT_BYTES) * quantized


def flowing_bytes(units: int, row: int, seqlen: int, held_out: int, steps: int) -> int:
    """What flows between blocks in the stage, wherever it lies, bytes.

    Args:
        units: units of blocks.
        row: hidden states of a row, bytes.
        seqlen: tokens of a row.
        held_out: rows that judge.
        steps: optimizer steps.
    """
    step = rows_of_step(seqlen) * row
    ahead = min(max(step, AHEAD_BYTES), steps * step)
    return (2 * units + 1) * step + STREAMS * (held_out * row + ahead)
