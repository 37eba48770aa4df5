"""Plain rounding: matrices straight from disk to disk, several at a time, no model and no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from auto_round.facts.layer import Layer
from auto_round.numerics.format import Format
from auto_round.numerics.importance import Importance
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.numerics.scale import Stats
from auto_round.numerics.search import BY_SQUARES
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.recast import as_wanted
from auto_round.pipeline.machine.workers import workers
from auto_round.pipeline.running.rounding import round_matrix
from auto_round.pipeline.running.shared_numbers import bind_tied, tied_layers
from auto_round.pipeline.writing.outputs import Outputs, Written
from auto_round.ranks.ranks import divide
from auto_round.tuning.weights import measured

BURST_BYTES = 1 << 30
"""Source bytes for each rank between two journal entries; each entry waits for the disk."""

T = TypeVar("T")
Encoded = Mapping[str, Mapping[str, Tensor]]
"""Format -> tensors of a layer as they are stored."""


def nbytes(layer: Layer) -> int:
    """Bytes of a layer on disk."""
    return math.prod(layer.shape) * layer.dtype.itemsize


def bursts(sizes: Mapping[str, int], ranks: int = 1) -> Iterator[list[str]]:
    """Units in their order, cut into bursts of about `BURST_BYTES` for each of the ranks."""
    burst: list[str] = []
    filled = 0
    for unit, size in sizes.items():
        burst.append(unit)
        filled += size
        if filled >= BURST_BYTES * ranks:
            yield burst
            burst, filled = [], 0
    if burst:
        yield burst


def round_together(job: Job, layers: Sequence[tuple[Layer, Format]], outputs: Outputs) -> dict[str, Written]:
    """Read, round, pack and write layers, each on one of the ranks; the first writes what all of them packed.

    Args:
        job: the run.
        layers: layers with their formats.
        outputs: where the first one writes.

    Returns:
        Layer name -> what was written; for other ranks nothing was.

    Raises:
        NumericsError: a weight is not finite; names the tensor.
    """
    ranks = job.ranks
    if ranks.size == 1:
        return round_layers(job, layers, outputs.put)
    own = _share(layers, ranks.rank, ranks.size)
    if ranks.rank:
        packed = round_layers(job, own, lambda layer, q: _encoded(job, layer, q))
        for _ in ranks.to_first(_listed(packed)):
            pass
        return {layer.name: {} for layer, _ in layers}
    written = round_layers(job, own, outputs.put)
    for tensors in ranks.to_first(_listed({})):
        for name, encoded in _by_layer(tensors).items():
            written[name] = outputs.put_encoded(encoded)
    return written


def _share(layers: Sequence[tuple[Layer, Format]], rank: int, size: int) -> list[tuple[Layer, Format]]:
    """The layers of one rank: those that share a number stay together."""
    tied = tied_layers({layer.name: fmt for layer, fmt in layers})
    leader = {name: names[0] for names in tied for name in names}
    costs: dict[str, int] = {}
    for layer, _ in layers:
        first = leader.get(layer.name, layer.name)
        costs[first] = costs.get(first, 0) + nbytes(layer)
    own = set(divide(costs, size)[rank])
    return [item for item in layers if leader.get(item[0].name, item[0].name) in own]


def _encoded(job: Job, layer: Layer, q: QuantizedLayer) -> Encoded:
    return {name: exporter.encode(layer, q) for name, exporter in job.exporters.items()}


def _listed(packed: Mapping[str, Encoded]) -> dict[tuple[str, str, str], Tensor]:
    """Tensors by layer, format and name."""
    return {
        (layer, form, name): tensor
        for layer, formats in packed.items()
        for form, tensors in formats.items()
        for name, tensor in tensors.items()
    }


def _by_layer(tensors: Mapping[tuple[str, str, str], Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The opposite of `_listed`."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for (layer, form, name), tensor in tensors.items():
        found.setdefault(layer, {}).setdefault(form, {})[name] = tensor
    return found


def round_layers(
    job: Job, layers: Sequence[tuple[Layer, Format]], put: Callable[[Layer, QuantizedLayer], T]
) -> dict[str, T]:
    """Read, round, pack and write layers; layer name -> what `put` gave.

    Reading and writing overlap with arithmetic: as many matrices are in memory as there are workers.

    Args:
        job: the run.
        layers: layers with their formats.
        put: packs and writes one layer.

    Raises:
        NumericsError: a weight is not finite; names the tensor.
    """
    formats = _bound(job, layers)

    def work(item: tuple[Layer, Format]) -> tuple[str, T]:
        layer, fmt = item
        weight = as_wanted(job.source.read(layer), job.kept_dtype)
        squares = job.importance.get(layer.alone)
        importance, effort = None, None
        if squares is not None and job.effort is not None:
            importance, effort = Importance(squares), BY_SQUARES
        bound = formats.get(layer.name, fmt)
        q = round_matrix(layer.alone, weight, bound, job.device_of(layer), importance, effort)
        return layer.name, put(layer, QuantizedLayer(q))

    # The largest first, so that no worker begins a large one when the others have finished.
    largest_first = sorted(layers, key=lambda item: nbytes(item[0]), reverse=True)
    with workers(job.device) as pool:
        return dict(pool.map(work, largest_first))


def _bound(job: Job, layers: Sequence[tuple[Layer, Format]]) -> dict[str, Format]:
    """Formats of the layers that share a number with others, bound to the ranges of all of them.

    These are read twice. Layers that share a number lie in one block, and so in one burst.
    """
    formats = {layer.name: fmt for layer, fmt in layers}
    tied = tied_layers(formats)
    if not tied:
        return {}
    shared = {name for names in tied for name in names}

    def extremes(item: tuple[Layer, Format]) -> tuple[str, Stats]:
        layer, fmt = item
        stats = measured(layer.alone, fmt, as_wanted(job.source.read(layer), job.kept_dtype).to(job.device))
        whole = Stats(stats.lo.amin((-2, -1), keepdim=True), stats.hi.amax((-2, -1), keepdim=True))
        return layer.name, whole

    with workers(job.device) as pool:
        ranges = dict(pool.map(extremes, (item for item in layers if item[0].name in shared)))
    return bind_tied(formats, tied, ranges)
