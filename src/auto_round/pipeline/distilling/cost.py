"""How long tuning all blocks together will take, from shapes alone."""

from __future__ import annotations

from auto_round.pipeline.fitting.work import Workload, active_weights, moved_by_token
from auto_round.tuning.distill import rows_of_step

PASSES = 5
"""Forward passes that a step costs as much as: original, rounded, rounded again, and its gradients (two).
Blocks that stay in memory take one less."""
HEAD_PASSES = 4
"""Products with the head in a step: two models' predictions, and the gradient (as much as two)."""
MOVED_BYTES = 600
"""Bytes moved for each weight in a step: it is rounded, with gradients, and moved by Adam. Fitted to the
processor time of these parts alone, over the bandwidth measured beside them: 607 with an 8-million-weight
model at 2 bits on one core with AVX-512."""
RESCALED_BYTES = 200
"""The same where codes stay."""


def stage_seconds(work: Workload, operations: float, bandwidth: float) -> float:
    """Estimate how long the stage of a run takes; 0 where it is not asked for.

    Args:
        work: the run.
        operations: floating-point operations per second of the device.
        bandwidth: bytes per second of an elementwise operation.
    """
    stage, facts = work.together, work.source.facts
    if stage is None:
        return 0.0
    tokens = float(stage.steps * rows_of_step(work.seqlen) * work.seqlen)
    judged = float((1 + len(stage.looks)) * work.held_out * work.seqlen)
    passed = PASSES * tokens + judged
    products = passed * active_weights(work)
    products += (HEAD_PASSES * tokens + 2 * judged) * facts.vocabulary * facts.width
    moved = float(stage.steps * (RESCALED_BYTES if stage.codes_stay else MOVED_BYTES)) * work.quantized
    moved += passed * moved_by_token(work)
    return 2 * products / operations + moved / bandwidth
