"""Layers outside the blocks that the plan quantizes: the output head, as a rule."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from auto_round.calibration.observe import InputMoments
from auto_round.facts.layer import Layer, Role
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.kept_dtype import as_wanted
from auto_round.pipeline.running.input_squares import InputSquares
from auto_round.pipeline.running.rounding import round_matrix
from auto_round.pipeline.running.streams import Streams


def quantize_outside(
    job: Job, streams: Streams, write: Callable[[Layer, QuantizedLayer], None]
) -> tuple[QTensor | None, dict[str, InputSquares]]:
    """Quantize layers that belong to no block.

    The head is searched with the importance of its own inputs, from the unquantized stream.

    Returns:
        The head's codes if it was quantized, and the mean squares of its inputs where they were measured.

    Raises:
        NumericsError: a weight is not finite.
    """
    head: QTensor | None = None
    inputs: dict[str, InputSquares] = {}
    for layer, fmt in job.quantized().values():
        if layer.block is not None or layer.role is Role.TOWER:
            continue
        importance = None
        # A tied head is the embedding, which was rounded before the first block.
        shared = layer.name == job.plan.tied_head and not job.plan.untie_head
        measured = (job.tune.search or job.saves_imatrix) and streams.tuned
        if layer.name == job.source.head and measured and not shared:
            moments = _head_inputs(job, streams)
            importance = moments.importance()
            if importance is not None:
                inputs[layer.tensor] = InputSquares(importance.squares.cpu(), moments.count)
        weight = as_wanted(job.source.read(layer), job.kept_dtype)
        q = round_matrix(layer.tensor, weight, fmt, job.device_of(layer), importance, job.effort)
        write(layer, QuantizedLayer(q))
        if layer.name == job.source.head:
            head = q
    return head, inputs


def head_weight(job: Job, head: QTensor | None) -> Tensor | None:
    """The rounded head `[vocabulary, width]` as a run multiplies by it; None where the head is kept."""
    return None if head is None else head.format.dequantize(head, job.dtype).to(job.device)


def _head_inputs(job: Job, streams: Streams) -> InputMoments:
    moments = InputMoments()
    with job.source.stem(job.device, job.dtype) as stem:
        for i in range(streams.tuned):
            moments.add(stem.finish_inputs(streams.reference[0][i : i + 1].to(job.device)))
    return moments
