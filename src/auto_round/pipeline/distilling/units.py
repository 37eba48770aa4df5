"""Units of blocks opened one after another: the original and the rounded one from one read of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from auto_round.facts.flow import States
from auto_round.facts.group_names import outside, prefixes_of
from auto_round.models.matrix_experts import computes_in
from auto_round.models.roles import may_route
from auto_round.numerics.activation import ActivationFormat
from auto_round.numerics.head_steps import HeadSteps
from auto_round.numerics.qtensor import QTensor
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.distilling.shelf import LEARNED, Shelf
from auto_round.pipeline.machine.memory import release_freed_memory
from auto_round.pipeline.running.attention_states import rounded_states
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.block_group import BlockGroup
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.pipeline.running.tune_group import make_unit
from auto_round.pipeline.running.unit import Unit, as_read, bound_formats
from auto_round.tuning.quantized_inputs import quantized_inputs
from auto_round.tuning.samples import Samples, run_block
from auto_round.tuning.student import NORM, Student, UntunedWeight, weight_of
from auto_round.tuning.weights import RescaledWeight, Weight, measured

LARGE = 1 << 23
"""Weights of a unit from which on its memory is given back at once. Smaller ones fit into each other's holes,
and asking the system for the same pages again would take a tenth of a step."""


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Some rows and what the blocks are called with for them.

    Attributes:
        table: arguments of all blocks.
        first: row of the table that the first of them is.
        count: how many.
        masks: `[count, length]` bool, True where a position counts; None where all do.
    """

    table: ArgumentTable
    first: int
    count: int
    masks: Tensor | None

    def mask_of(self, position: int) -> Tensor | None:
        """Which positions of one of the `States` count: the rows' masks for the first, all of the others."""
        return self.masks if position == 0 else None


@dataclass(frozen=True, slots=True)
class OpenUnit:
    """Blocks with their weights, and what is learned of them.

    Attributes:
        unit: the original blocks.
        student: the same with rounded weights.
        activations: module -> what its input is rounded to.
        states: attention module -> part -> its steps, where these are calibrated.
        prefixes: position in the unit -> path of the block in the model.
        rows: what flows through.
        at_once: rows that go through at once.
    """

    unit: Unit
    student: Student
    activations: Mapping[str, ActivationFormat]
    states: Mapping[str, Mapping[str, HeadSteps]]
    prefixes: Mapping[str, str]
    rows: RowBatch
    at_once: int

    def run_original(self, inputs: States, out: States) -> None:
        """Write what the original blocks give into `out`."""
        self._run(self.unit.group, inputs, out)

    def run_rounded(self, parameters: Mapping[str, Tensor], inputs: States, out: States) -> None:
        """Write what the blocks give with other parameters into `out`, which may be the inputs' storage."""

        def rounded(*given: object) -> States:
            found: States = functional_call(self.unit.group, dict(parameters), given)
            return found

        with self.rounding():
            self._run(rounded, inputs, out)

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """Inputs of layers, keys and values are rounded meanwhile."""
        with (
            quantized_inputs(self.unit.group, self.activations),
            rounded_states(self.unit.group, self.states),
        ):
            yield

    def quantized(self) -> tuple[dict[str, QTensor], dict[str, Tensor]]:
        """Codes of each weight; and all that changed, as readers of the output compute with it."""
        codes = self.student.quantize()
        dtypes = {name: parameter.dtype for name, parameter in self.unit.group.named_parameters()}
        read = {
            n: as_read(q, self.unit.originals[n].dtype, dtypes[n], self.unit.rounds_input_of(n))
            for n, q in codes.items()
        }
        norms = {n: value.to(dtypes[n]) for n, value in self.student.kept_norms().items()}
        return codes, read | norms

    def samples(self, inputs: States) -> Samples:
        """The rows as the blocks take them."""
        arguments = self.unit.arguments(self.rows.first)
        return Samples(inputs, inputs, arguments, kind=arguments.kind)

    def _run(self, block: Callable[..., States], inputs: States, out: States) -> None:
        samples = self.samples(inputs)
        run_block(block, samples, out, batch_size=self.at_once, device=self.unit.device)


@dataclass(frozen=True, slots=True)
class Units:
    """All units of a model, of which one is open at a time.

    Attributes:
        job: the run.
        members: indices of the blocks of each unit.
        shelf: what is learned of them.
        ranges: extremes of inputs that calibration fixed.
        states: attention module of the model -> part -> its steps.
    """

    job: Job
    members: Sequence[Sequence[int]]
    shelf: Shelf
    ranges: InputRanges
    states: Mapping[str, Mapping[str, HeadSteps]]

    def flowing(self, number: int) -> int:
        """How many of the `States` behind a unit flow; those behind are handed on beside them."""
        return len(self.job.source.blocks[self.members[number][0]].flow.taken)

    @contextmanager
    def open(self, number: int, rows: RowBatch) -> Iterator[OpenUnit]:
        """Read the weights of a unit; they are freed on leaving.

        Args:
            number: of the unit.
            rows: what is to flow through.
        """
        job, indices = self.job, self.members[number]
        with ExitStack() as stack:
            blocks = [stack.enter_context(job.source.block(i, job.device)) for i in indices]
            prefixes = prefixes_of(job.source.blocks, indices)
            group = BlockGroup(blocks, [job.source.blocks[i].flow for i in indices])
            flat = {n: p.detach() for n, p in group.named_parameters() if p.dim() == 1}
            unit = make_unit(job, indices, group, rows.table)
            yield OpenUnit(
                unit=unit,
                student=self._student(unit, number, flat),
                activations=self._activations(unit, prefixes),
                states={n: found for n, a in unit.attentions.items() if (found := self.states.get(a.module))},
                prefixes=prefixes,
                rows=rows,
                at_once=job.tune.pass_rows,
            )
            large = sum(w.numel() for w in unit.originals.values()) >= LARGE
            del blocks, group, flat, unit
        if large:
            release_freed_memory()  # units leave holes, which would add up

    def _student(self, unit: Unit, number: int, flat: Mapping[str, Tensor]) -> Student:
        """What is learned of a unit; norms begin as the model has them."""
        learned = {n: t.to(unit.device) for n, t in self.shelf.load(number, LEARNED).items()}
        learned |= {n: t.to(unit.device) for n, t in self.shelf.constants(number).items()}
        weights: dict[str, Weight | RescaledWeight] = {}
        for name, fmt in bound_formats(unit.formats, unit.originals).items():
            original = unit.originals[name]
            stats = measured(name, fmt, original)
            dtype = computes_in(unit.group, name)
            plain = UntunedWeight(fmt.bind(stats), original, stats, dtype)
            weights[name] = weight_of(name, plain, learned)
        norms: dict[str, Tensor] = {}
        for name, value in flat.items():
            if name not in weights and not may_route(name.rpartition(".")[0]):
                known = learned.get(NORM + name)
                norms[name] = value.to(torch.float32, copy=True) if known is None else known
        own = {name: value.dtype for name, value in flat.items()}
        return Student(unit.group, weights, norms, own)

    def _activations(self, unit: Unit, prefixes: Mapping[str, str]) -> dict[str, ActivationFormat]:
        names = {outside(name, prefixes): name for name in unit.activations}
        inside = {names[n]: ends for n, ends in self.ranges.extremes.items() if n in names}
        return InputRanges(inside).formats(unit.activations)
