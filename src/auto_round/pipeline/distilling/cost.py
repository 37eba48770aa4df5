"""How long tuning all blocks together will take, from shapes alone."""

from __future__ import annotations

from auto_round.pipeline.fitting.work import Workload, active_weights
from auto_round.tuning.distill import rows_of_step

PASSES = 5
"""Forward passes that a step costs as much as: original, rounded, rounded again, and its gradients (two)."""
HEAD_PASSES = 4
"""Products with the head in a step: two models' predictions, and the gradient (as much as two)."""
MOVED_BYTES = 1200
"""Bytes moved for each weight in a step: it is rounded twice, once with gradients, and moved by Adam."""
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
    products = (PASSES * tokens + judged) * active_weights(work)
    products += (HEAD_PASSES * tokens + 2 * judged) * facts.vocabulary * facts.width
    moved = float(stage.steps * (RESCALED_BYTES if stage.codes_stay else MOVED_BYTES)) * work.quantized
    return 2 * products / operations + moved / bandwidth
