"""What a run holds in memory, part by part, from shapes and settings alone.

The figures of one weight follow from what the code holds; `docs/machines.md` has them beside measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from auto_round.facts.layer import Layer
from auto_round.numerics.at_once import weights_at_once
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.search import BAND as SEARCH_BAND
from auto_round.pipeline.fitting.level import MemoryLevel, StreamPlace
from auto_round.pipeline.fitting.parts import FLOAT
from auto_round.pipeline.fitting.plan import STREAMS, StageMemory
from auto_round.pipeline.fitting.products import kept_products
from auto_round.pipeline.fitting.together import STAY, Together
from auto_round.pipeline.fitting.work import Workload
from auto_round.pipeline.machine.workers import worker_count
from auto_round.tuning.steps import sign_move

HOLES = 16
"""Bytes of holes that plain rounding leaves for each weight of a band, which make peaks differ by 8 %."""
ENCODED = 32
"""Bytes that PyTorch forms for each weight of a band that gets codes of a floating grid (measured)."""
SEARCHED = 48
"""Bytes that the search of ranges forms for each weight of a band (measured: 29), and its holes."""
PACKED = 1
"""Bytes of a code before it is packed."""
COMPILER = 130 << 20
"""The compiler of `torch.compile` and its graphs, on the host (measured: 138 to 160 MB)."""
FRAGMENTS = {
    "tune": (0.21, 0.38),
    "search": (0.08, 0.30),
    "plain": (0.10, 0.18),
    "all blocks": (0.19, 0.35),
    STAY: (0.10, 0.0),
    "verify": (0.15, 0.40),
}
"""Share of the memory given out and returned that the C library cannot give out again, as measured in float32
and in bfloat16 on the host: there tensors of two and of four bytes a number come and go in turn, and programs
of products lie between them. While offsets are tuned ("tune"; without steps it is "search" or "plain") the
largest of many blocks counts, and tensors that grow with the batch do not fit where smaller ones had been; in
bfloat16 it is the share of what comes and goes."""
OTHER_FRAGMENTS = (0.15, 0.27)
"""The same of all other stages."""
MAPPED = 32 << 20
"""Bytes from which on the C library maps a tensor by itself, so that it leaves no hole."""
_STAY = (STREAMS, "rounding", "compiler")
"""Parts that stay while steps come and go."""
WORKSPACE = 12 << 20
"""Buffers of libraries, and small things."""


def stages_of(work: Workload, level: MemoryLevel) -> tuple[StageMemory, ...]:
    """What each stage of a run holds at a level."""
    return _Demand.of(work, level).stages()


_OF_LOOP = ("offsets and ranges", "optimizer", "rounding", "activations and gradients")
"""Parts that are there while offsets are tuned, and not while ranges are searched."""


@dataclass(frozen=True, slots=True)
class _Demand(Together):
    """What each stage holds."""

    def stages(self) -> tuple[StageMemory, ...]:
        if not self.sizes.tokens:
            return (self._stage("round", self._plain()), *self._verify())
        return (
            *self._smooth(),
            self._stage("trace", {}, self._trace()),
            self._tuning(),
            *self._all_blocks(),
            self._stage("measure", self._measure() | self._streams_there(), self._streams_here()),
            *self._verify(),
        )

    def _stage(self, name: str, at_work: dict[str, int], aside: dict[str, int] | None = None) -> StageMemory:
        """A stage from what lies where blocks are tuned, and what lies on the host in any case."""
        if self.work.device.type == "cpu":
            host, device = at_work | (aside or {}), dict[str, int]()
        else:
            host, device = dict(aside or {}), at_work
        for parts in (host, device):
            if parts is host or parts:
                parts["workspace"] = WORKSPACE + self._fragments(name, parts)
        return StageMemory(name, host, device)

    def _fragments(self, name: str, parts: Mapping[str, int]) -> int:
        """Bytes beside what a stage holds that the C library cannot give out again."""
        stay = parts.get(STAY, 0)
        held = sum(parts.values()) - stay
        steps = name == "tune" and bool(self.work.tune.iters)
        rounds = "search" if self.work.tune.search else "plain"
        kind = rounds if name == "tune" and not steps else name
        wide, narrow = FRAGMENTS.get(kind, OTHER_FRAGMENTS)
        on_host = self.work.device.type == "cpu"
        if not steps:
            narrows = on_host and self.work.dtype is torch.bfloat16
            return int(held * (wide, narrow)[narrows] + stay * FRAGMENTS[STAY][narrows])
        rounded = self._tuned_parameters()
        tuned = [count for (parameter, _), count in self.parameters.items() if parameter in rounded]
        small = sum(count for count in tuned if count * FLOAT < MAPPED)
        if self.work.dtype is not torch.bfloat16 or not on_host:
            mapped = FLOAT * (sum(tuned) - small) // sum(1 for _ in self.groups())  # offsets, of a group
            return int(wide * max(0, held - mapped))
        moves = held - sum(parts.get(part, 0) for part in _STAY)
        return int(max(wide * held, narrow * small / max(1, sum(tuned)) * moves))

    def _tuned_parameters(self) -> set[str]:
        """Parameters of blocks that are rounded."""
        layers = self.work.source.layers
        return {a.parameter for a in layers if a.block is not None and a.name in self.work.formats}

    # --- where hidden states lie

    def _streams_there(self) -> dict[str, int]:
        """Both streams and the targets on the accelerator."""
        on_device = self.level.streams is StreamPlace.DEVICE and self.work.device.type != "cpu"
        return {STREAMS: self._copies() * self.sizes.stream} if on_device else {}

    def _streams_here(self) -> dict[str, int]:
        """The same on the host. Pages of files count as long as nobody else needs their memory."""
        return {} if self._streams_there() else {STREAMS: self._copies() * self.sizes.stream}

    def _copies(self) -> int:
        """Both streams, the targets, and those of the next blocks."""
        return 3 if self.work.ahead is None else 4

    def _ahead(self) -> int:
        """The next blocks as they are run while others are tuned."""
        work = self.work
        own, itemsize = work.source.dtype.itemsize, work.dtype.itemsize
        found = 0
        for layers in self.groups():
            count = sum(layer.weights for layer in layers)
            widest = max(max(layer.shape) for layer in layers)
            rows = min(self.level.rows or work.tune.batch_size, work.tune.batch_size)
            weights = count * (itemsize + (own if own != itemsize else 0))
            found = max(found, weights + 4 * widest * rows * work.seqlen * itemsize)
        return found

    # --- stages

    def _smooth(self) -> tuple[StageMemory, ...]:
        """A block in float32 but for its experts, or what few rows are embedded by; no long rows."""
        work = self.work
        if not work.smooths:
            return ()
        blocks: dict[int, int] = {}
        for layer in work.source.layers:
            if layer.block is not None:
                itemsize = work.source.dtype.itemsize if self.by_matrix(layer) else FLOAT
                blocks[layer.block] = blocks.get(layer.block, 0) + layer.weights * itemsize
        embeddings = (self.sizes.outside - self.head()) // work.dtype.itemsize
        traced = embeddings * FLOAT + _cast(embeddings * FLOAT, work.source.dtype.itemsize, FLOAT)
        weights = {"weights": max(blocks.values(), default=0)}
        before = {"embeddings": traced}  # gone when the first block comes
        if work.device.type != "cpu":
            return (self._stage("smooth", weights, before),)
        return (self._stage("smooth", max(weights, before, key=lambda parts: sum(parts.values()))),)

    def _trace(self) -> dict[str, int]:
        own, dtype = self.work.source.dtype, self.work.dtype
        embeddings = self.sizes.outside - self.head()
        return {
            "embeddings": embeddings + _cast(embeddings, own.itemsize, dtype.itemsize),
            STREAMS: 3 * self.sizes.stream,
        }

    def _tuning(self) -> StageMemory:
        """Blocks while they are tuned, on all their devices."""
        work, others = self.work, dict[str, int]()
        for layers in self.groups():
            for device in dict.fromkeys(work.elsewhere.values()):
                there = [a for a in layers if work.elsewhere.get(a.name) == device]
                held = sum(self._block(there).values())
                others[str(device)] = max(others.get(str(device), 0), held)
        beside: dict[str, int] = {}
        if work.ahead == work.device:
            beside = {"targets ahead": self._ahead()}
        elif work.ahead is not None:
            others[str(work.ahead)] = others.get(str(work.ahead), 0) + self._ahead()
        on_host = {"weights placed on the host": others.pop("cpu")} if "cpu" in others else {}
        on_host |= {"compiler": COMPILER} if work.compiled else {}
        stage = self._stage(
            "tune", self._tune() | beside | self._streams_there(), self._streams_here() | on_host
        )
        return replace(stage, others=others)

    def _tune(self) -> dict[str, int]:
        groups = ([a for a in layers if a.name not in self.work.elsewhere] for layers in self.groups())
        return max(map(self._block, groups), key=lambda parts: sum(parts.values()))

    def _block(self, layers: list[Layer]) -> dict[str, int]:
        """A group of blocks, or its layers on one device, while it is tuned or searched."""
        work, tune = self.work, self.work.tune
        count = sum(layer.weights for layer in layers)
        quantized = [layer for layer in layers if layer.name in work.formats]
        tuned = sum(layer.weights for layer in quantized)
        stacked = [layer for layer in quantized if self.by_matrix(layer)]
        apart = sum(layer.weights for layer in stacked)
        largest = max(map(self.rounded_at_once, quantized), default=0)
        own, itemsize = work.source.dtype.itemsize, work.dtype.itemsize
        parts = {"weights": (count - apart) * itemsize + ((tuned - apart) * own if own != itemsize else 0)}
        parts["weights"] += apart * own
        parts["statistics"] = self.statistics(quantized)
        at_once = self.level.rows or tune.batch_size
        parts["programs of products"] = kept_products(work, layers, at_once)
        if not tune.iters:
            parts["ranges"] = self.ranges(quantized)
            formed = max(map(self._formed, quantized), default=0)
            rounding = (tuned if tune.search else largest) * FLOAT + formed
            # What rounding formed leaves holes, of other sizes than what comes then.
            holes = formed if tune.search else HOLES * min(SEARCH_BAND, largest)
            after = (tuned - apart) * itemsize + holes + max(self.forward(layers), largest * FLOAT)
            name = "search and rounding" if rounding > after else "rounded weights and activations"
            parts[name] = max(rounding, after) + tuned * PACKED
            return parts
        copies = 2 if tune.keep_best else 1
        state = 2 * FLOAT if tune.optimizer.value == "adam" else FLOAT if tune.momentum else 0
        own_ranges = self.ranges(quantized)
        parts["offsets and ranges"] = copies * ((tuned - apart) * FLOAT + own_ranges)
        parts["offsets and ranges"] += apart * (FLOAT + (copies - 1) * PACKED)
        parts["optimizer"] = tuned * state
        whole = [layer for layer in quantized if not self.by_matrix(layer)]
        kept = 0 if self.level.rounds_again else sum(map(self.kept, whole))
        parts["rounding"] = (tuned - apart) * itemsize + kept + apart * PACKED
        backward = max(self.backward(layers, tuned - apart), self.through(whole, tuned - apart, largest))
        at_once = self.passes() == 1 and sign_move(tune, 0) is not None
        if not at_once:  # else each matrix of a stack is learned as its gradient comes
            backward += apart * FLOAT
        parts["activations and gradients"] = backward
        searched = tuned * FLOAT + own_ranges + self.searched(quantized) * SEARCHED
        before = sum(parts[name] for name in _OF_LOOP)
        if tune.search and searched > before:  # ranges are searched before anything of the loop is there
            parts |= dict.fromkeys(_OF_LOOP, 0) | {"offsets and ranges": tuned * FLOAT + own_ranges}
            parts["search"] = searched - parts["offsets and ranges"]
        if work.by_predictions and any(layer.block == len(work.source.blocks) - 1 for layer in layers):
            parts["head and logits"] = self.sizes.outside + self.logits_budget()
        return parts

    def _all_blocks(self) -> tuple[StageMemory, ...]:
        """All blocks while they are tuned together."""
        config = self.work.together
        if config is None:
            return ()
        parts = self.of_step(config)
        # Rows are traced between two steps, when no block is there: what is cast then fits into their place.
        ends = max(self._ends() - parts[STAY], self.sizes.outside)
        parts = {"embeddings and head": ends} | parts
        aside, there = self.learned(config) | self._streams_here(), self._streams_there()
        between = self.between(config)  # lies where hidden states do
        if there:
            parts |= between | there
        else:
            aside |= between
        return (self._stage("all blocks", parts, aside),)

    def _measure(self) -> dict[str, int]:
        """Norm and head, after the last block."""
        return {"embeddings and head": self._ends(), "logits": self.logits()}

    def _ends(self) -> int:
        """Embedding and head, the larger as it is cast."""
        own, dtype = self.work.source.dtype, self.work.dtype
        return self.sizes.outside + _cast(self.largest_outside(), own.itemsize, dtype.itemsize)

    def _verify(self) -> tuple[StageMemory, ...]:
        """What was written, loaded by Transformers."""
        work = self.work
        if not work.reloads:
            return ()
        own, dtype = work.source.dtype, work.dtype
        outside = self.sizes.outside * own.itemsize // dtype.itemsize
        packed = max(0, work.output_bytes - outside)
        compared = {}
        if self.sizes.tokens:
            compared = {
                "logits": 2 * self.verified_logits() + self.cast_logits() + self.logits() // 4,
                STREAMS: self.sizes.stream,
            }
        at_work = max(work.output_bytes, self.largest_outside(), sum(compared.values()))
        loaded = {"model": self.sizes.outside + packed, **compared}
        loaded["at work"] = at_work - sum(
            compared.values()
        )  # pages of the files, before anything is compared
        return (self._stage("verify", loaded),)

    def _plain(self) -> dict[str, int]:
        """As many matrices as there are workers."""
        work = self.work
        layers = [layer for layer in work.source.layers if layer.name in work.formats]
        layers.sort(key=lambda layer: layer.weights, reverse=True)
        at_once = layers[: worker_count(work.device)]
        # As stored, as codes, as codes in a layout's order, and packed.
        each = work.source.dtype.itemsize + 3 * PACKED
        formed = sum(map(self._formed, at_once))
        return {"weights": each * sum(a.weights for a in at_once), "at work": formed}

    def _formed(self, layer: Layer) -> int:
        """What rounding of a layer without tuning forms: a band in float32, and what PyTorch makes of it."""
        count = layer.weights
        if self.work.tune.search:
            return min(SEARCH_BAND, count) * SEARCHED
        band = min(weights_at_once(self.work.device, SEARCH_BAND), count)
        if isinstance(self.work.formats[layer.name].grid, FloatGrid):
            return band * ENCODED
        return band * FLOAT * (1 if self.by_program(layer) else 2)


def _cast(nbytes: int, own: int, wanted: int) -> int:
    """What is read before it is cast, bytes."""
    return nbytes * own // wanted if own != wanted else 0
