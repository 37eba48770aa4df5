"""Blocks of encoders for images and sound: rounded first, so that language blocks see what they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from auto_round.calibration.observe import InputMoments, observe_inputs
from auto_round.facts.layer import Layer, Role
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.recast import as_wanted
from auto_round.pipeline.running.rounding import round_matrix

_WEIGHT = ".weight"


def round_towers(job: Job, write: Callable[[Layer, QuantizedLayer], None]) -> dict[str, Tensor]:
    """Round the matrices of towers that the plan quantizes.

    Their ranges are searched with the importance of their inputs in the rows with images, as those of the
    head are with its own.

    Args:
        job: the run.
        write: keeps a finished layer.

    Returns:
        Parameter of the model -> its rounded weight `[out, in]` in the dtype that blocks run in.

    Raises:
        NumericsError: a weight is not finite.
    """
    chosen = {n: pair for n, pair in job.quantized().items() if pair[0].role is Role.TOWER}
    if not chosen:
        return {}
    moments = _moments(job, [layer for layer, _ in chosen.values()]) if job.tune.search else {}
    rounded = {}
    for layer, fmt in chosen.values():
        seen = moments.get(layer.parameter.removesuffix(_WEIGHT))
        importance = None if seen is None else seen.importance()
        weight = as_wanted(job.source.read(layer), job.kept_dtype)
        q = round_matrix(layer.tensor, weight, fmt, job.device, importance, job.effort)
        write(layer, QuantizedLayer(q))
        rounded[layer.parameter] = q.format.dequantize(q, job.dtype).cpu()
    return rounded


def _moments(job: Job, layers: Sequence[Layer]) -> Mapping[str, InputMoments]:
    """Module -> second moments of its inputs in the rows that are tuned on."""
    rows = () if job.rows is None else job.rows.rows[: job.tuned]
    names = [layer.parameter.removesuffix(_WEIGHT) for layer in layers]
    with (
        job.source.stem(dtype=job.dtype, head=False, towers=True) as stem,
        observe_inputs(stem.model, names) as seen,
    ):
        for row in rows:
            if row.beside_text:
                stem.trace(row.inputs)
    return seen
