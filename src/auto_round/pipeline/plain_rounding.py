"""Plain rounding: matrices straight from disk to disk, several at a time, no model and no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from auto_round.export.exporter import Exporter
from auto_round.facts.layer import Layer
from auto_round.numerics.format import Format
from auto_round.numerics.importance import Importance
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.numerics.rule import Effort
from auto_round.numerics.scale import Stats
from auto_round.numerics.search import BY_SQUARES
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.kept_dtype import as_wanted
from auto_round.pipeline.machine.memory import keep_freed_memory
from auto_round.pipeline.machine.workers import workers
from auto_round.pipeline.running.rounding import round_matrix
from auto_round.pipeline.running.shared_numbers import bind_tied, tied_layers
from auto_round.pipeline.writing.outputs import Outputs, Written
from auto_round.ranks.ranks import Ranks, divide
from auto_round.tuning.weights import measured

BURST_BYTES = 1 << 30
"""Source bytes for each rank between two journal entries; each entry waits for the disk."""

T = TypeVar("T")
Encoded = Mapping[str, Mapping[str, Tensor]]
"""Format -> tensors of a layer as they are stored."""

Shares = list[list[tuple[Layer, Format]]]
"""Layers with their formats, rank by rank."""

NOTHING_LEFT: Shares = []
"""What the first rank sends at the end."""


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


@dataclass(frozen=True, slots=True)
class Rules:
    """How plain rounding rounds and packs, whoever does it: another process can be told all of it.

    Attributes:
        exporters: output format name -> exporter.
        dtype: dtype from which weights are rounded; None for that on disk.
        importance: tensor -> mean square of its inputs `[in]`; empty for none.
        effort: of the search of ranges; None for none.
    """

    exporters: Mapping[str, Exporter]
    dtype: torch.dtype | None
    importance: Mapping[str, Tensor]
    effort: Effort | None

    @classmethod
    def of(cls, job: Job) -> Rules:
        """What a job says of it."""
        return cls(job.exporters, job.kept_dtype, job.importance, job.effort)


@dataclass(frozen=True, slots=True)
class PlainRounding:
    """What plain rounding takes beside layers and formats.

    Attributes:
        rules: how weights are rounded and packed.
        read: weight of a layer, `[out, in]`, in its dtype on disk.
        device_of: where a layer is rounded.
        device: the main device.
    """

    rules: Rules
    read: Callable[[Layer], Tensor]
    device_of: Callable[[Layer], torch.device]
    device: torch.device

    @classmethod
    def of(cls, job: Job) -> PlainRounding:
        """What a job says of it."""
        return cls(Rules.of(job), job.source.read, job.device_of, job.device)

    def weight(self, layer: Layer) -> Tensor:
        """The weight of a layer as it is rounded."""
        return as_wanted(self.read(layer), self.rules.dtype)


def round_together(job: Job, layers: Sequence[tuple[Layer, Format]], outputs: Outputs) -> dict[str, Written]:
    """Read, round, pack and write layers: the part of the first rank, which writes what all of them packed.

    Args:
        job: the run.
        layers: layers with their formats.
        outputs: where it writes.

    Returns:
        Layer name -> what was written.

    Raises:
        NumericsError: a weight is not finite; names the tensor.
    """
    ranks, rounding = job.ranks, PlainRounding.of(job)
    if ranks.size == 1:
        return round_layers(rounding, layers, outputs.put)
    shares = ranks.first(_shares(layers, ranks.size))
    written = round_layers(rounding, shares[0], outputs.put)
    for tensors in ranks.to_first(_listed({})):
        for name, encoded in _by_layer(tensors).items():
            written[name] = outputs.put_encoded(encoded)
    return written


def help_rounding(rounding: PlainRounding, ranks: Ranks) -> None:
    """What the other ranks do of it: they round and pack what the first one sends, until it sends no more.

    Raises:
        NumericsError: a weight is not finite; names the tensor.
    """
    if rounding.device.type == "cpu":
        keep_freed_memory(of_any_size=True)
    while shares := ranks.first(NOTHING_LEFT):
        packed = round_layers(rounding, shares[ranks.rank], partial(_encoded, rounding.rules.exporters))
        for _ in ranks.to_first(_listed(packed)):
            pass


def _shares(layers: Sequence[tuple[Layer, Format]], size: int) -> Shares:
    """The layers of each rank: those that share a number stay together."""
    tied = tied_layers({layer.name: fmt for layer, fmt in layers})
    leader = {name: names[0] for names in tied for name in names}
    costs: dict[str, int] = {}
    for layer, _ in layers:
        first = leader.get(layer.name, layer.name)
        costs[first] = costs.get(first, 0) + layer.nbytes
    owner = {name: rank for rank, names in enumerate(divide(costs, size)) for name in names}
    shares: Shares = [[] for _ in range(size)]
    for layer, fmt in layers:
        shares[owner[leader.get(layer.name, layer.name)]].append((layer, fmt))
    return shares


def _encoded(exporters: Mapping[str, Exporter], layer: Layer, q: QuantizedLayer) -> Encoded:
    return {name: exporter.encode(layer, q) for name, exporter in exporters.items()}


def _listed(packed: Mapping[str, Encoded]) -> dict[tuple[str, str, str], Tensor]:
    """Tensors by layer, format and name."""
    return {
        (layer, form, name): tensor
        for layer, formats in packed.items()
        for form, tensors in formats.items()
        for name, tensor in tensors.items()
    }


def _by_layer(tensors: Mapping[tuple[str, str, str], Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Layer -> format -> name -> tensor: the inverse of `_listed`."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for (layer, form, name), tensor in tensors.items():
        found.setdefault(layer, {}).setdefault(form, {})[name] = tensor
    return found


def round_layers(
    rounding: PlainRounding, layers: Sequence[tuple[Layer, Format]], put: Callable[[Layer, QuantizedLayer], T]
) -> dict[str, T]:
    """Read, round, pack and write layers; layer name -> what `put` gave.

    Reading and writing overlap with arithmetic: as many matrices are in memory as there are workers.

    Args:
        rounding: how.
        layers: layers with their formats.
        put: packs and writes one layer.

    Raises:
        NumericsError: a weight is not finite; names the tensor.
    """
    formats = _bound(rounding, layers)

    def work(item: tuple[Layer, Format]) -> tuple[str, T]:
        layer, fmt = item
        weight = rounding.weight(layer)
        squares = rounding.rules.importance.get(layer.alone)
        importance, effort = None, None
        if squares is not None and rounding.rules.effort is not None:
            importance, effort = Importance(squares), BY_SQUARES
        bound = formats.get(layer.name, fmt)
        q = round_matrix(layer.alone, weight, bound, rounding.device_of(layer), importance, effort)
        return layer.name, put(layer, QuantizedLayer(q))

    # The largest first, so that no worker begins a large one when the others have finished.
    largest_first = sorted(layers, key=lambda item: item[0].nbytes, reverse=True)
    with workers(rounding.device) as pool:
        return dict(pool.map(work, largest_first))


def _bound(rounding: PlainRounding, layers: Sequence[tuple[Layer, Format]]) -> dict[str, Format]:
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
        stats = measured(layer.alone, fmt, rounding.weight(layer).to(rounding.device))
        whole = Stats(stats.lo.amin((-2, -1), keepdim=True), stats.hi.amax((-2, -1), keepdim=True))
        return layer.name, whole

    with workers(rounding.device) as pool:
        ranges = dict(pool.map(extremes, (item for item in layers if item[0].name in shared)))
    return bind_tied(formats, tied, ranges)
