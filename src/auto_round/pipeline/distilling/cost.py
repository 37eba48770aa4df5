"""How long tuning all blocks together will take, from shapes alone."""

from __future__ import annotations

from auto_round.pipeline.fitting.level import MemoryLevel
from auto_round.pipeline.fitting.together import Together
from auto_round.pipeline.fitting.work import Workload, active_weights, moved_by_token
from auto_round.tuning.distill import rows_of_step

PASSES = 4
"""Forward passes that a step of a block costs as much as, where the block stays in memory between the two
sweeps (`sweep.Sweep`): original, rounded, and its gradients (two)."""
PASSES_AGAIN = 1
"""Those of other blocks besides: rounded again in the backward sweep."""
LOOKS_BESIDE = 3
"""Passes of the held-out rows besides one for each look after steps (`stage.distill`): original and rounded
before the first step, rounded once more where what was found is packed."""
HEAD_PASSES_OF_STEP = 4
"""Products with the head in a step: two models' predictions, and the gradient (as much as two)."""
MOVED_BYTES = 600
"""Bytes moved for each weight in a step: it is rounded, with gradients, and moved by Adam. Fitted to the
processor time of these parts alone, over the bandwidth measured beside them: 607 with an 8-million-weight
model at 2 bits on one core with AVX-512."""
RESCALED_BYTES = 200
"""The same where codes stay."""


def stage_seconds(work: Workload, level: MemoryLevel, operations: float, bandwidth: float) -> float:
    """Estimate how long the stage of a run takes; 0 where it is not asked for.

    Args:
        work: the run.
        level: how it is run.
        operations: floating-point operations per second of the device.
        bandwidth: bytes per second of an elementwise operation.
    """
    config, facts = work.together, work.source.facts
    if config is None:
        return 0.0
    tokens = float(config.steps * rows_of_step(work.seqlen) * work.seqlen)
    looked_at = float(work.held_out * work.seqlen)
    passed = passes(work, level) * tokens + (len(config.looks) + LOOKS_BESIDE) * looked_at
    products = passed * active_weights(work)
    head = HEAD_PASSES_OF_STEP * tokens + 2 * (1 + len(config.looks)) * looked_at
    products += head * facts.vocabulary * facts.width
    moved = float(config.steps * (RESCALED_BYTES if config.codes_stay else MOVED_BYTES)) * work.quantized
    moved += passed * moved_by_token(work)
    return 2 * products / operations + moved / bandwidth


def passes(work: Workload, level: MemoryLevel) -> float:
    """Forward passes that a step costs as much as, mean over the units of blocks.

    Args:
        work: the run.
        level: how it is run; what stays in memory follows from it.
    """
    together = Together.of(work, level)
    units = sum(1 for _ in together.groups())
    return PASSES + PASSES_AGAIN * (1 - len(together.stay()) / max(1, units))
