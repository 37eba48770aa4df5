"""How long tuning all blocks together will take, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.tuning.distill import looks, rows_of_step

PASSES = 5
"""Forward passes that a step costs as much as: original, rounded, rounded again, and its gradients (two)."""
HEAD_PASSES = 4
"""Products with the head in a step: two models' predictions, and the gradient (as much as two)."""
MOVED_BYTES = 1200
"""Bytes moved for each weight in a step: it is rounded twice, once with gradients, and moved by Adam."""
RESCALED_BYTES = 200
"""The same where codes stay."""


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


def stage_seconds(work: StageWork, operations: float, bandwidth: float) -> float:
    """Estimate how long the stage takes.

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
    return 2 * products / operations + moved / bandwidth
