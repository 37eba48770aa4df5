"""What tuning all blocks together will take, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.pipeline.distilling.feed import AHEAD_BYTES
from auto_round.pipeline.distilling.stage import STATE_BYTES
from auto_round.pipeline.running.streams import SPILL_BYTES
from auto_round.tuning.distill import looks, rows_of_step

PASSES = 5
"""Forward passes that a step costs as much as: original, rounded, rounded again, and its gradients (two)."""
HEAD_PASSES = 4
"""Products with the head in a step: two models' predictions, and the gradient (as much as two)."""
MOVED_BYTES = 1200
"""Bytes moved for each weight in a step: it is rounded twice, once with gradients, and moved by Adam."""
RESCALED_BYTES = 200
"""The same where codes stay."""
CODES_BYTES = 2
"""Of each weight on disk where codes stay: its code, and its part of what is kept of a group (36 bytes)."""
STREAMS = 3
"""What is traced of rows: the original's stream, the rounded one's and room for targets."""
KEPT_BYTES = 28
"""Of each weight on disk: states of the last durable step and of the one at hand, and the best offsets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """What the cost follows from.

    Attributes:
        steps: optimizer steps.
        seqlen: tokens of a row.
        held_out: rows that judge.
        block_weights: weights in all blocks that one token meets.
        head_weights: weights of the output head.
        quantized: weights that are quantized.
        codes_stay: steps of groups are learned only.
    """

    steps: int
    seqlen: int
    held_out: int
    block_weights: float
    head_weights: int
    quantized: int
    codes_stay: bool = False


@dataclass(frozen=True, slots=True)
class StageCost:
    """What the stage will take beside the rest of the run.

    Attributes:
        seconds: wall time.
        host_bytes: memory for offsets and moments; they lie in files where they are larger.
    """

    seconds: float
    host_bytes: int


def stage_cost(work: StageWork, operations: float, bandwidth: float) -> StageCost:
    """Estimate the stage.

    Args:
        work: what the cost follows from.
        operations: floating-point operations per second of the device.
        bandwidth: bytes per second of an elementwise operation.
    """
    tokens = float(work.steps * rows_of_step(work.seqlen) * work.seqlen)
    judged = float((1 + len(looks(work.steps))) * work.held_out * work.seqlen)
    products = (PASSES * tokens + judged) * work.block_weights
    products += (HEAD_PASSES * tokens + 2 * judged) * work.head_weights
    moved = float(work.steps * (RESCALED_BYTES if work.codes_stay else MOVED_BYTES)) * work.quantized
    states = 0 if work.codes_stay else STATE_BYTES * work.quantized
    return StageCost(
        seconds=2 * products / operations + moved / bandwidth,
        host_bytes=states if states <= SPILL_BYTES else 0,
    )


def states_on_disk(quantized: int, *, codes_stay: bool) -> int:
    """What the states take of the disk until the run ends, bytes.

    Args:
        quantized: weights that are quantized.
        codes_stay: steps of groups are learned only.
    """
    return (CODES_BYTES if codes_stay else KEPT_BYTES) * quantized


def flow_on_disk(units: int, row: int, seqlen: int, held_out: int) -> int:
    """What flows between blocks in the stage, where it lies in files, bytes.

    Args:
        units: units of blocks.
        row: hidden states of a row, bytes.
        seqlen: tokens of a row.
        held_out: rows that judge.
    """
    step = rows_of_step(seqlen) * row
    return (2 * units + 1) * step + STREAMS * (held_out * row + max(step, AHEAD_BYTES))
