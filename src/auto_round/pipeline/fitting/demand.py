"""What a run holds in memory, part by part, from shapes and settings alone.

The figures of one weight follow from what the code holds; `docs/machines.md` has them beside measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from auto_round.facts.layer import Layer, Role
from auto_round.models.causal_attention import BANDS as ATTENTION_BANDS
from auto_round.numerics.at_once import weights_at_once
from auto_round.numerics.compiled_rounding import can_round
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.importance import TILE
from auto_round.numerics.search import BAND as SEARCH_BAND
from auto_round.pipeline.fitting.level import Level, Place
from auto_round.pipeline.fitting.logits import MEASURED_LOGITS_BYTES, logits_budget
from auto_round.pipeline.fitting.plan import STREAMS, Stage
from auto_round.pipeline.fitting.products import kept_products
from auto_round.pipeline.fitting.work import Sizes, Workload, active_share, measure_sizes
from auto_round.pipeline.machine.workers import worker_count
from auto_round.tuning.steps import sign_move

FLOAT = 4
"""Bytes of a number in float32: offsets, gradients, range multipliers."""
KEPT_BY_ROUNDING = 5
"""What the backward pass of the rounding keeps of each weight, where no compiled program does it: a number in
float32 and a mark."""
SPACING = 4
"""The same of floating grids besides: the spacing at each weight."""
HOLES = 16
"""Bytes of holes that plain rounding leaves for each weight of a band, which make peaks differ by 8 %."""
ENCODED = 32
"""Bytes that PyTorch forms for each weight of a band that gets codes of a floating grid (measured)."""
SEARCHED = 48
"""Bytes that the search of ranges forms for each weight of a band (measured: 29), and its holes."""
NORMS = 5
"""Hidden states that the norms and sums of a block keep for the backward pass."""
EXPERTS_AT_WORK = 9
"""Copies of the largest parameter of fused experts that grouped products form (measured)."""
EXPERT_AT_WORK = 5
"""Copies of one expert's matrix, in the compute dtype, where they run matrix by matrix (measured)."""
EXPERT_BY_PROGRAM = 1
"""The same where a program moves offsets as it finds their gradient: the rounded matrix and its gradient take
the same memory in turn (`tuning.workspace`)."""
GATE = 6
"""Numbers that the gate between an expert's two products keeps and forms for each that it gives, beside
inputs and outputs of the products: as gpt-oss has it; others keep up to 4 fewer."""
VERIFIED_ROWS, VERIFIED_POSITIONS = 4, 512
"""Rows, and most positions of each, that a reloaded folder is asked for (`checking.compare_rows`)."""
PACKED = 1
"""Bytes of a code before it is packed."""
COMPILER = 120 << 20
"""The compiler of `torch.compile` and its graphs, on the host (measured, with holes: 138 MB)."""
FRAGMENTS = 0.15
"""Share of the memory given out and returned that the C library cannot give out again, as measured."""
FRAGMENTS_OF_STEPS = 0.19
"""The same while offsets are tuned: the largest of many blocks counts, and tensors that grow with the batch
do not fit where smaller ones had been."""
FRAGMENTS_IN_BFLOAT16 = 0.27
"""The same in bfloat16 on the host: tensors of two and of four bytes a number come and go in turn, and
programs of products lie between them (measured: 0.02 to 0.23)."""
FRAGMENTS_OF_STEPS_IN_BFLOAT16 = 0.47
"""The same while offsets are tuned, of what comes and goes (measured: 0.4 after 100 steps)."""
MAPPED = 32 << 20
"""Bytes from which on the C library maps a tensor by itself, so that it leaves no hole."""
_STAY = (STREAMS, "rounding", "compiler")
"""Parts that stay while steps come and go."""
WORKSPACE = 12 << 20
"""Buffers of libraries, and small things."""


def stages_of(work: Workload, level: Level) -> tuple[Stage, ...]:
    """What each stage of a run holds at a level."""
    parameters: dict[tuple[str, object], int] = {}
    experts: dict[tuple[str, int | None], int] = {}
    for layer in work.source.layers:
        count = math.prod(layer.shape)
        there, own = (layer.parameter, work.elsewhere.get(layer.name)), (layer.parameter, layer.expert)
        parameters[there] = parameters.get(there, 0) + count
        experts[own] = experts.get(own, 0) + count
    return _Demand(work, measure_sizes(work), level, parameters, experts).stages()


_OF_LOOP = ("offsets and ranges", "optimizer", "rounding", "activations and gradients")
"""Parts that are there while offsets are tuned, and not while ranges are searched."""


@dataclass(frozen=True, slots=True)
class _Demand:
    """A run at one level.

    Attributes:
        work: the run.
        sizes: of its parts.
        level: how it is run.
        parameters: parameter and device (None: the main one) -> its weights there: the fused experts of a
            device are rounded as one.
        experts: parameter and expert -> weights of that.
    """

    work: Workload
    sizes: Sizes
    level: Level
    parameters: Mapping[tuple[str, object], int]
    experts: Mapping[tuple[str, int | None], int]

    def stages(self) -> tuple[Stage, ...]:
        if not self.sizes.tokens:
            return (self._stage("round", self._plain()), *self._verify())
        return (
            self._stage("trace", {}, self._trace()),
            self._tuning(),
            self._stage("measure", self._measure() | self._streams_there(), self._streams_here()),
            *self._verify(),
        )

    def _stage(self, name: str, at_work: dict[str, int], aside: dict[str, int] | None = None) -> Stage:
        """A stage from what lies where blocks are tuned, and what lies on the host in any case."""
        if self.work.device.type == "cpu":
            host, device = at_work | (aside or {}), dict[str, int]()
        else:
            host, device = dict(aside or {}), at_work
        for parts in (host, device):
            if parts is host or parts:
                parts["workspace"] = WORKSPACE + self._fragments(name, parts)
        return Stage(name, host, device)

    def _fragments(self, name: str, parts: Mapping[str, int]) -> int:
        """Bytes beside what a stage holds that the C library cannot give out again."""
        held, steps = sum(parts.values()), name == "tune" and bool(self.work.tune.iters)
        share = FRAGMENTS_OF_STEPS if steps else FRAGMENTS
        if self.work.dtype is not torch.bfloat16 or self.work.device.type != "cpu":
            return int(share * held)
        if not steps:
            return int(FRAGMENTS_IN_BFLOAT16 * held)
        rounded = self._tuned_parameters()
        tuned = [count for (parameter, _), count in self.parameters.items() if parameter in rounded]
        small = sum(count for count in tuned if count * FLOAT < MAPPED) / max(1, sum(tuned))
        moves = held - sum(parts.get(part, 0) for part in _STAY)
        return int(max(share * held, FRAGMENTS_OF_STEPS_IN_BFLOAT16 * small * moves))

    def _tuned_parameters(self) -> set[str]:
        """Parameters of blocks that are rounded."""
        layers = self.work.source.layers
        return {a.parameter for a in layers if a.block is not None and a.name in self.work.formats}

    # --- where hidden states lie

    def _streams_there(self) -> dict[str, int]:
        """Both streams and the targets on the accelerator."""
        on_device = self.level.streams is Place.DEVICE and self.work.device.type != "cpu"
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
        for layers in self._groups():
            count = sum(math.prod(layer.shape) for layer in layers)
            widest = max(max(layer.shape) for layer in layers)
            rows = min(self.level.rows or work.tune.batch_size, work.tune.batch_size)
            weights = count * (itemsize + (own if own != itemsize else 0))
            found = max(found, weights + 4 * widest * rows * work.seqlen * itemsize)
        return found

    # --- stages

    def _trace(self) -> dict[str, int]:
        own, dtype = self.work.source.dtype, self.work.dtype
        embeddings = self.sizes.outside - self._head()
        return {
            "embeddings": embeddings + _cast(embeddings, own.itemsize, dtype.itemsize),
            STREAMS: 3 * self.sizes.stream,
        }

    def _tuning(self) -> Stage:
        """Blocks while they are tuned, on all their devices."""
        work, others = self.work, dict[str, int]()
        for layers in self._groups():
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
        groups = ([a for a in layers if a.name not in self.work.elsewhere] for layers in self._groups())
        return max(map(self._block, groups), key=lambda parts: sum(parts.values()))

    def _block(self, layers: list[Layer]) -> dict[str, int]:
        """A group of blocks, or its layers on one device, while it is tuned or searched."""
        work, tune = self.work, self.work.tune
        count = sum(math.prod(layer.shape) for layer in layers)
        quantized = [layer for layer in layers if layer.name in work.formats]
        tuned = sum(math.prod(layer.shape) for layer in quantized)
        stacked = [layer for layer in quantized if self._by_matrix(layer)]
        apart = sum(math.prod(layer.shape) for layer in stacked)
        largest = max(map(self._together, quantized), default=0)
        own, itemsize = work.source.dtype.itemsize, work.dtype.itemsize
        parts = {"weights": (count - apart) * itemsize + ((tuned - apart) * own if own != itemsize else 0)}
        parts["weights"] += apart * own
        parts["statistics"] = self._statistics(quantized)
        at_once = self.level.rows or tune.batch_size
        parts["programs of products"] = kept_products(work, layers, at_once)
        if not tune.iters:
            parts["ranges"] = self._ranges(quantized)
            formed = max(map(self._formed, quantized), default=0)
            rounding = (tuned if tune.search else largest) * FLOAT + formed
            # What rounding formed leaves holes, of other sizes than what comes then.
            holes = formed if tune.search else HOLES * min(SEARCH_BAND, largest)
            after = (tuned - apart) * itemsize + holes + max(self._forward(layers), largest * FLOAT)
            name = "search and rounding" if rounding > after else "rounded weights and activations"
            parts[name] = max(rounding, after) + tuned * PACKED
            return parts
        copies = 2 if tune.keep_best else 1
        state = 2 * FLOAT if tune.optimizer.value == "adam" else FLOAT if tune.momentum else 0
        own_ranges = self._ranges(quantized)
        parts["offsets and ranges"] = copies * ((tuned - apart) * FLOAT + own_ranges)
        parts["offsets and ranges"] += apart * (FLOAT + (copies - 1) * PACKED)
        parts["optimizer"] = tuned * state
        whole = [layer for layer in quantized if not self._by_matrix(layer)]
        kept = 0 if self.level.rounds_again else sum(map(self._kept, whole))
        parts["rounding"] = (tuned - apart) * itemsize + kept + apart * PACKED
        backward = max(self._backward(layers, tuned - apart), self._through(whole, tuned - apart, largest))
        at_once = self._passes() == 1 and sign_move(tune, 0) is not None
        if not at_once:  # else each matrix of a stack is learned as its gradient comes
            backward += apart * FLOAT
        parts["activations and gradients"] = backward
        searched = tuned * FLOAT + own_ranges + self._searched(quantized) * SEARCHED
        before = sum(parts[name] for name in _OF_LOOP)
        if tune.search and searched > before:  # ranges are searched before anything of the loop is there
            parts |= dict.fromkeys(_OF_LOOP, 0) | {"offsets and ranges": tuned * FLOAT + own_ranges}
            parts["search"] = searched - parts["offsets and ranges"]
        if work.by_predictions and any(layer.block == len(work.source.blocks) - 1 for layer in layers):
            parts["head and logits"] = self.sizes.outside + logits_budget(
                work.device, sparing=work.memory.low_gpu_mem_usage
            )
        return parts

    def _measure(self) -> dict[str, int]:
        """Norm and head, after the last block."""
        own, dtype = self.work.source.dtype, self.work.dtype
        outside = self.sizes.outside
        return {
            "embeddings and head": outside + _cast(self._largest_outside(), own.itemsize, dtype.itemsize),
            "logits": self._logits(),
        }

    def _verify(self) -> tuple[Stage, ...]:
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
                "logits": 2 * self._verified_logits() + self._cast_logits() + self._logits() // 4,
                STREAMS: self.sizes.stream,
            }
        at_work = max(work.output_bytes, self._largest_outside(), sum(compared.values()))
        loaded = {"model": self.sizes.outside + packed, **compared}
        loaded["at work"] = at_work - sum(
            compared.values()
        )  # pages of the files, before anything is compared
        return (self._stage("verify", loaded),)

    def _plain(self) -> dict[str, int]:
        """As many matrices as there are workers."""
        work = self.work
        layers = [layer for layer in work.source.layers if layer.name in work.formats]
        layers.sort(key=lambda layer: math.prod(layer.shape), reverse=True)
        at_once = layers[: worker_count(work.device)]
        # As stored, as codes, as codes in a layout's order, and packed.
        each = work.source.dtype.itemsize + 3 * PACKED
        formed = sum(map(self._formed, at_once))
        return {"weights": each * sum(math.prod(a.shape) for a in at_once), "at work": formed}

    def _formed(self, layer: Layer) -> int:
        """What rounding of a layer without tuning forms: a band in float32, and what PyTorch makes of it."""
        count = math.prod(layer.shape)
        if self.work.tune.search:
            return min(SEARCH_BAND, count) * SEARCHED
        band = min(weights_at_once(self.work.device, SEARCH_BAND), count)
        if isinstance(self.work.formats[layer.name].grid, FloatGrid):
            return band * ENCODED
        return band * FLOAT * (1 if self._by_program(layer) else 2)

    # --- parts of them

    def _groups(self) -> Iterator[list[Layer]]:
        """Layers of each group of blocks that are tuned as one."""
        blocks: dict[int, list[Layer]] = {}
        for layer in self.work.source.layers:
            if layer.block is not None:
                blocks.setdefault(layer.block // self.work.nblocks, []).append(layer)
        yield from blocks.values()

    def _by_matrix(self, layer: Layer) -> bool:
        """Whether a layer belongs to experts that run, and are tuned, one matrix after the other."""
        work = self.work
        half = work.dtype is torch.float16
        known = layer.expert is not None and work.source.tells_experts_apart(layer.parameter)
        return known and work.device.type == "cpu" and not work.tune.by_row and not half

    def _ends_expert(self, layer: Layer) -> bool:
        """Whether a layer is the second matrix of an expert that runs matrix by matrix."""
        return (
            self._by_matrix(layer) and layer.rows is None and layer.shape[0] == self.work.source.facts.width
        )

    def _at_work(self, layer: Layer) -> int:
        """What the products of an expert, or of all experts of a parameter, form and keep for gradients."""
        work, count = self.work, self._together(layer)
        if not self._by_matrix(layer):
            copies = EXPERTS_AT_WORK if work.source.tells_experts_apart(layer.parameter) else 0
        elif layer.name in work.formats and sign_move(work.tune, 0) and self._by_program(layer):
            copies = EXPERT_BY_PROGRAM
        else:
            copies = EXPERT_AT_WORK
        return count * copies * work.dtype.itemsize

    def _together(self, layer: Layer) -> int:
        """Weights that are rounded at once with those of a layer: its parameter, or its expert."""
        if self._by_matrix(layer):
            return self.experts[layer.parameter, layer.expert]
        return self.parameters[layer.parameter, self.work.elsewhere.get(layer.name)]

    def _backward(self, layers: list[Layer], tuned: int) -> int:
        """Gradients of the loss by rounded weights, while activations are still there."""
        itemsize = self.work.dtype.itemsize
        found, passes = tuned * itemsize, self._passes()
        fused = (self._at_work(layer) for layer in layers if layer.role is Role.EXPERT)
        activations = self._activations(layers) + max(fused, default=0)
        # Those of the last matrices come while attention is differentiated, and passes leave holes.
        return activations + found + (tuned * FLOAT if passes > 1 else 0)

    def _through(self, layers: list[Layer], tuned: int, largest: int) -> int:
        """The same gradients on their way through the rounding."""
        itemsize = self.work.dtype.itemsize
        through = tuned * (FLOAT + itemsize) + (largest * FLOAT if itemsize != FLOAT else 0)
        if self.level.rounds_again:
            through += max(map(self._kept, layers), default=0) - tuned * itemsize
        return through

    def _kept(self, layer: Layer) -> int:
        """What the backward pass of the rounding of a layer keeps."""
        if self._by_program(layer):
            return 0
        fmt = self.work.formats[layer.name]
        floats = isinstance(fmt.grid, FloatGrid)
        return math.prod(layer.shape) * (KEPT_BY_ROUNDING + (SPACING if floats else 0))

    def _by_program(self, layer: Layer) -> bool:
        """Whether a C program rounds a layer, which forms and keeps nothing besides."""
        fmt = self.work.formats[layer.name]
        return self.work.device.type == "cpu" and can_round(fmt.grid, fmt.group)

    def _searched(self, layers: list[Layer]) -> int:
        """Weights of the largest band that is searched at a time: matrix by matrix."""
        return min(SEARCH_BAND, max((math.prod(a.shape) for a in layers), default=0))

    def _ranges(self, layers: list[Layer]) -> int:
        """Multipliers and measured ranges of all groups, both ends."""
        groups = (math.prod(self.work.formats[a.name].group.scale_shape(a.shape)) for a in layers)
        return 4 * FLOAT * sum(groups)

    def _statistics(self, layers: list[Layer]) -> int:
        """Squares and products of the inputs of each matrix and expert, as sums and as means."""
        if not self.work.tune.search:
            return 0
        inputs = {(a.parameter, a.expert): a.shape[1] for a in layers}
        return 2 * sum(inputs.values()) * (TILE + 2) * FLOAT

    def _passes(self) -> int:
        tune = self.work.tune
        rows = min(tune.batch_size, max(1, self.work.rows))
        return math.ceil(rows / (self.level.rows or rows)) * tune.accumulate

    def _activations(self, layers: list[Layer]) -> int:
        """What the backward pass through a group keeps and forms, bytes."""
        work = self.work
        facts, length, share = work.source.facts, work.seqlen, active_share(work.source)
        rows = min(self.level.rows or work.tune.batch_size, work.tune.batch_size, max(1, work.rows))
        widths = sum(sum(a.shape) * (share if a.role is Role.EXPERT else 1.0) for a in layers)
        widths += share * GATE * sum(a.shape[1] for a in layers if self._ends_expert(a))
        widest = max((max(a.shape) for a in layers), default=0)
        scores = 0.0
        if work.device.type == "cpu":
            kept = (ATTENTION_BANDS + 1) / (2 * ATTENTION_BANDS)
            narrow = work.dtype is torch.bfloat16  # measured: no less where compiled
            formed = 1 / ATTENTION_BANDS if work.compiled and not narrow else 1
            scores = facts.heads * length * (kept * work.nblocks + formed)
        each = widths + NORMS * facts.width * work.nblocks + 3 * widest + scores
        return int(rows * length * each * work.dtype.itemsize)

    def _forward(self, layers: list[Layer]) -> int:
        """What a pass through a group forms where nothing is differentiated: gate, product and activation."""
        work = self.work
        rows = min(self.level.rows or work.tune.batch_size, max(1, work.rows))
        widest = max((max(a.shape) for a in layers), default=0)
        scores = work.source.facts.heads * work.seqlen // ATTENTION_BANDS if work.device.type == "cpu" else 0
        formed = max(3 * widest, 2 * scores) * work.dtype.itemsize
        if work.rounds_inputs:  # in float32: scaled, on the grid, and scaled back
            formed = max(formed, 3 * max((a.shape[1] for a in layers), default=0) * FLOAT)
        return rows * work.seqlen * formed

    def _head(self) -> int:
        """The output head, where it is a matrix of its own."""
        source = self.work.source
        heads = (math.prod(a.shape) for a in source.layers if a.role is Role.HEAD)
        return 0 if source.tied_head else sum(heads) * self.work.dtype.itemsize

    def _largest_outside(self) -> int:
        """The larger of embedding and head in the compute dtype."""
        facts = self.work.source.facts
        return facts.vocabulary * facts.width * self.work.dtype.itemsize

    def _logits(self) -> int:
        """Logits of two models in float32, and what is formed of them."""
        facts = self.work.source.facts
        return min(MEASURED_LOGITS_BYTES, 4 * FLOAT * facts.vocabulary * self.work.seqlen)

    def _verified_logits(self) -> int:
        """Logits of one model for the rows on which a folder is compared."""
        work = self.work
        each = work.source.facts.vocabulary * work.dtype.itemsize
        return min(MEASURED_LOGITS_BYTES, VERIFIED_ROWS * min(work.seqlen, VERIFIED_POSITIONS) * each)

    def _cast_logits(self) -> int:
        """A row of those in float32, as they are compared; none are formed where they are float32."""
        row = min(self.work.seqlen, VERIFIED_POSITIONS) * self.work.source.facts.vocabulary * FLOAT
        return row if self.work.dtype.itemsize < FLOAT else 0


def _cast(nbytes: int, own: int, wanted: int) -> int:
    """What is read before it is cast, bytes."""
    return nbytes * own // wanted if own != wanted else 0
