"""What the parts of a run hold in memory: bytes of weights, rounding, gradients, activations and logits.

The figures of one weight follow from what the code holds; `docs/machines.md` has them beside measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from auto_round.evaluate.logits import COMPARED_BYTES
from auto_round.facts.layer import Layer, Role
from auto_round.models.causal_attention import BANDS as ATTENTION_BANDS
from auto_round.numerics.compiled_rounding import can_round
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.importance import TILE
from auto_round.numerics.search import BAND as SEARCH_BAND
from auto_round.pipeline.fitting.level import MemoryLevel
from auto_round.pipeline.fitting.logits import VERIFIED_POSITIONS, VERIFIED_ROWS, logits_budget
from auto_round.pipeline.fitting.work import Sizes, Workload, active_share, measure_sizes
from auto_round.tuning.steps import sign_move

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

FLOAT = 4
"""Bytes of a number in float32: offsets, gradients, range multipliers."""
KEPT_BY_ROUNDING = 5
"""What the backward pass of the rounding keeps of each weight, where no compiled program does it: a number in
float32 and a mark."""
SPACING = 4
"""The same of floating grids besides: the spacing at each weight."""
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


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What the parts of a run hold in memory at one level.

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
    level: MemoryLevel
    parameters: Mapping[tuple[str, object], int]
    experts: Mapping[tuple[str, int | None], int]

    @classmethod
    def of(cls, work: Workload, level: MemoryLevel) -> Self:
        """Parts of a run at a level."""
        parameters: dict[tuple[str, object], int] = {}
        experts: dict[tuple[str, int | None], int] = {}
        for layer in work.source.layers:
            count = layer.weights
            there, own = (layer.parameter, work.elsewhere.get(layer.name)), (layer.parameter, layer.expert)
            parameters[there] = parameters.get(there, 0) + count
            experts[own] = experts.get(own, 0) + count
        return cls(work, measure_sizes(work), level, parameters, experts)

    def groups(self) -> Iterator[list[Layer]]:
        """Layers of each group of blocks that are tuned as one."""
        blocks: dict[int, list[Layer]] = {}
        for layer in self.work.source.layers:
            if layer.block is not None:
                blocks.setdefault(layer.block // self.work.nblocks, []).append(layer)
        yield from blocks.values()

    def by_matrix(self, layer: Layer) -> bool:
        """Whether a layer belongs to experts that run, and are tuned, one matrix after the other."""
        work = self.work
        half = work.dtype is torch.float16
        known = layer.expert is not None and work.source.tells_experts_apart(layer.parameter)
        return known and work.device.type == "cpu" and not work.tune.by_row and not half

    def ends_expert(self, layer: Layer) -> bool:
        """Whether a layer is the second matrix of an expert that runs matrix by matrix."""
        return self.by_matrix(layer) and layer.rows is None and layer.shape[0] == self.work.source.facts.width

    def at_work(self, layer: Layer) -> int:
        """What the products of an expert, or of all experts of a parameter, form and keep for gradients."""
        work, count = self.work, self.rounded_at_once(layer)
        if not self.by_matrix(layer):
            copies = EXPERTS_AT_WORK if work.source.tells_experts_apart(layer.parameter) else 0
        elif layer.name in work.formats and sign_move(work.tune, 0) and self.by_program(layer):
            copies = EXPERT_BY_PROGRAM
        else:
            copies = EXPERT_AT_WORK
        return count * copies * work.dtype.itemsize

    def rounded_at_once(self, layer: Layer) -> int:
        """Weights that are rounded at once with those of a layer: its parameter, or its expert."""
        if self.by_matrix(layer):
            return self.experts[layer.parameter, layer.expert]
        return self.parameters[layer.parameter, self.work.elsewhere.get(layer.name)]

    def backward(self, layers: list[Layer], tuned: int) -> int:
        """Gradients of the loss by rounded weights, while activations are still there."""
        itemsize = self.work.dtype.itemsize
        found, passes = tuned * itemsize, self.passes()
        fused = (self.at_work(layer) for layer in layers if layer.role is Role.EXPERT)
        activations = self.activations(layers) + max(fused, default=0)
        # Those of the last matrices come while attention is differentiated, and passes leave holes.
        return activations + found + (tuned * FLOAT if passes > 1 else 0)

    def through(self, layers: list[Layer], tuned: int, largest: int) -> int:
        """The same gradients on their way through the rounding."""
        itemsize = self.work.dtype.itemsize
        # The program reads bfloat16 as it is; PyTorch makes float32 of it, matrix by matrix.
        read = self.work.dtype is torch.bfloat16 and all(map(self.by_program, layers))
        through = tuned * (FLOAT + itemsize) + (largest * FLOAT if itemsize != FLOAT and not read else 0)
        if self.level.rounds_again:
            through += max(map(self.kept, layers), default=0) - tuned * itemsize
        return through

    def kept(self, layer: Layer) -> int:
        """What the backward pass of the rounding of a layer keeps."""
        if self.by_program(layer):
            return 0
        fmt = self.work.formats[layer.name]
        floats = isinstance(fmt.grid, FloatGrid)
        return layer.weights * (KEPT_BY_ROUNDING + (SPACING if floats else 0))

    def by_program(self, layer: Layer) -> bool:
        """Whether a C program rounds a layer, which forms and keeps nothing besides."""
        fmt = self.work.formats[layer.name]
        return self.work.device.type == "cpu" and can_round(fmt.grid, fmt.group)

    def searched(self, layers: list[Layer]) -> int:
        """Weights of the largest band that is searched at a time: matrix by matrix."""
        return min(SEARCH_BAND, max((a.weights for a in layers), default=0))

    def ranges(self, layers: list[Layer]) -> int:
        """Multipliers and measured ranges of all groups, both ends."""
        groups = (math.prod(self.work.formats[a.name].group.scale_shape(a.shape)) for a in layers)
        return 4 * FLOAT * sum(groups)

    def statistics(self, layers: list[Layer]) -> int:
        """Squares and products of the inputs of each matrix and expert, as sums and as means."""
        if not self.work.tune.search:
            return 0
        inputs = {(a.parameter, a.expert): a.shape[1] for a in layers}
        return 2 * sum(inputs.values()) * (TILE + 2) * FLOAT

    def passes(self) -> int:
        """Passes through a block whose gradients make up a step."""
        tune = self.work.tune
        rows = min(tune.batch_size, max(1, self.work.rows))
        return math.ceil(rows / (self.level.rows or rows)) * tune.accumulate

    def activations(self, layers: list[Layer], at_once: int | None = None) -> int:
        """What the backward pass through a group keeps and forms, bytes; rows of a batch or as many."""
        work, tune = self.work, self.work.tune
        rows = at_once or min(self.level.rows or tune.batch_size, tune.batch_size, max(1, work.rows))
        kept = self.kept_activations(layers, rows)
        widest = max((max(a.shape) for a in layers), default=0)
        scores = 0.0
        if work.device.type == "cpu":
            narrow = work.dtype is torch.bfloat16  # measured: no less where compiled
            formed = 1 / ATTENTION_BANDS if work.compiled and not narrow else 1
            scores = work.source.facts.heads * work.seqlen * formed
        return kept + int(rows * work.seqlen * (3 * widest + scores) * work.dtype.itemsize)

    def kept_activations(self, layers: list[Layer], rows: int) -> int:
        """What the forward pass of some rows through a group leaves for the backward pass, bytes."""
        work = self.work
        facts, length, share = work.source.facts, work.seqlen, active_share(work.source)
        widths = sum(sum(a.shape) * (share if a.role is Role.EXPERT else 1.0) for a in layers)
        widths += share * GATE * sum(a.shape[1] for a in layers if self.ends_expert(a))
        scores = 0.0
        if work.device.type == "cpu":
            kept = (ATTENTION_BANDS + 1) / (2 * ATTENTION_BANDS)
            scores = facts.heads * length * kept * work.nblocks
        each = widths + NORMS * facts.width * work.nblocks + scores
        return int(rows * length * each * work.dtype.itemsize)

    def forward(self, layers: list[Layer]) -> int:
        """What a pass through a group forms where nothing is differentiated: gate, product and activation."""
        work = self.work
        rows = min(self.level.rows or work.tune.batch_size, max(1, work.rows))
        widest = max((max(a.shape) for a in layers), default=0)
        scores = work.source.facts.heads * work.seqlen // ATTENTION_BANDS if work.device.type == "cpu" else 0
        formed = max(3 * widest, 2 * scores) * work.dtype.itemsize
        if work.rounds_inputs:  # in float32: scaled, on the grid, and scaled back
            formed = max(formed, 3 * max((a.shape[1] for a in layers), default=0) * FLOAT)
        return rows * work.seqlen * formed

    def head(self) -> int:
        """The output head, where it is a matrix of its own."""
        source = self.work.source
        heads = (a.weights for a in source.layers if a.role is Role.HEAD)
        return 0 if source.tied_head else sum(heads) * self.work.dtype.itemsize

    def largest_outside(self) -> int:
        """The larger of embedding and head in the compute dtype."""
        facts = self.work.source.facts
        return facts.vocabulary * facts.width * self.work.dtype.itemsize

    def logits(self) -> int:
        """Logits of two models in float32, and what is formed of them."""
        facts = self.work.source.facts
        return min(COMPARED_BYTES, 4 * FLOAT * facts.vocabulary * self.work.seqlen)

    def verified_logits(self) -> int:
        """Logits of one model for the rows on which a folder is compared."""
        work = self.work
        each = work.source.facts.vocabulary * work.dtype.itemsize
        return min(COMPARED_BYTES, VERIFIED_ROWS * min(work.seqlen, VERIFIED_POSITIONS) * each)

    def cast_logits(self) -> int:
        """A row of those in float32, as they are compared; none are formed where they are float32."""
        row = min(self.work.seqlen, VERIFIED_POSITIONS) * self.work.source.facts.vocabulary * FLOAT
        return row if self.work.dtype.itemsize < FLOAT else 0

    def logits_budget(self) -> int:
        """Memory for logits while predictions are compared."""
        return logits_budget(self.work.device, sparing=self.work.memory.low_gpu_mem_usage)
