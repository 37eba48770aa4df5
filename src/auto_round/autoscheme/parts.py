"""Parts: layers of one block whose rounding is measured as one, and a block that runs with them rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.autoscheme.candidates import Candidates
from auto_round.autoscheme.groups import group_layers
from auto_round.calibration.observe import observe_inputs
from auto_round.calibration.observe_experts import observe_experts, observe_ranges
from auto_round.facts.flow import States
from auto_round.facts.inputs import WEIGHT, owner_of
from auto_round.models.matrix_experts import computes_in
from auto_round.numerics.activation import ActivationFormat
from auto_round.numerics.activation_float import InputFormat
from auto_round.numerics.format import Format
from auto_round.numerics.importance import AnyImportance
from auto_round.numerics.rule import Effort
from auto_round.numerics.search import QUICK
from auto_round.pipeline.deciding.activations import formats_inside, to_calibrate
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.machine.memory import release_freed_memory
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.block_group import BlockGroup, GroupArguments
from auto_round.pipeline.running.input_ranges import NO_RANGES, InputRanges, settle_ranges
from auto_round.pipeline.running.rounding import round_matrix
from auto_round.pipeline.running.tune_group import cast_group, inside_group, refuse_not_finite
from auto_round.pipeline.running.unit import as_read, bound_formats
from auto_round.tuning.quantized_inputs import quantized_inputs
from auto_round.tuning.settings import PLAIN_FROM_BITS


@dataclass(frozen=True, slots=True)
class Part:
    """Layers of one block, or one layer outside, whose rounding is measured as one.

    Attributes:
        layers: their names.
        block: index of the block; None for the output head and the embedding.
    """

    layers: tuple[str, ...]
    block: int | None


Trial = tuple[Part, int]
"""A part and the number of the option that it is rounded by."""


@dataclass(frozen=True, slots=True)
class ScoringSetting:
    """What is measured, and on what.

    Attributes:
        job: model, rows, device and dtype.
        candidates: what can be chosen.
        search: ranges are searched before rounding, as the run will do; False rounds plainly.
        batch_size: rows that go through a block at a time.
    """

    job: Job
    candidates: Candidates
    search: bool
    batch_size: int

    def effort(self, bits: int) -> Effort | None:
        """How long ranges are searched for a width: briefly, and not at all where nothing is gained."""
        return QUICK if self.search and bits < PLAIN_FROM_BITS else None

    @property
    def options(self) -> range:
        """Numbers of the options."""
        return range(len(self.candidates.labels))

    @property
    def embedding(self) -> str | None:
        """Name of the embedding, where its scheme is chosen."""
        return self.candidates.embedding

    def at_the_head(self, part: Part) -> bool:
        """Whether the output head multiplies with what a part rounds: it is the head, or tied to it."""
        embeds = part.layers[0] == self.embedding
        return part.block is None and (not embeds or self.job.source.tied_head)

    def keeps(self, part: Part, option: int) -> bool:
        """Whether an option keeps all layers of a part as they are, so that nothing is lost."""
        plan = self.candidates.plans[option]
        return all(plan.scheme_of(name) is None for name in part.layers)


def find_parts(candidates: Candidates) -> tuple[Part, ...]:
    """The parts to measure: the least that may be chosen for; wider groups of the user's are sums of them."""
    block_of = {layer.name: layer.block for layer in candidates.layers.values()}
    found: list[Part] = []
    for names in group_layers(tuple(candidates.layers.values()), candidates.chosen, fused=candidates.fused):
        inside: dict[int | None, list[str]] = {}
        for name in names:
            inside.setdefault(block_of[name], []).append(name)
        found += [Part(tuple(members), block) for block, members in inside.items()]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class RoundedLayers:
    """What a block computes with when some of its layers are rounded.

    Attributes:
        parameters: parameter of the group -> rounded weight.
        activations: module of the group -> what its input is rounded to.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, ActivationFormat] = field(default_factory=dict)


CLEAN = RoundedLayers()
"""Nothing is rounded."""


@dataclass(frozen=True, slots=True)
class WatchedFormat:
    """Takes the place of an activation format to watch what is rounded; says of itself what that one says.

    Attributes:
        format: the format.
    """

    format: ActivationFormat

    @property
    def name(self) -> str:
        """Its name."""
        return self.format.name

    @property
    def bits(self) -> int:
        """Its bits."""
        return self.format.bits

    @property
    def end_steps(self) -> float:
        """Its `end_steps`."""
        return self.format.end_steps


@dataclass(slots=True)
class OpenBlock:
    """One block with its weights, ready to be run with and without roundings.

    Attributes:
        setting: what is measured.
        index: of the block.
        group: the block.
        originals: parameters to round, in the model's dtype.
        arguments: what the block is called with beside what flows.
        importance: parameter -> second moments of its inputs; filled by `observe`.
        ranges: extremes of inputs; filled by `observe`.
    """

    setting: ScoringSetting
    index: int
    group: BlockGroup
    originals: Mapping[str, Tensor]
    arguments: GroupArguments
    importance: dict[str, AnyImportance] = field(default_factory=dict)
    ranges: InputRanges = NO_RANGES

    def run(self, states: States, rows: Sequence[int], rounded: RoundedLayers = CLEAN) -> States:
        """Outputs of the block for some rows, `[rows, length, width]` each, on its device."""
        args, kwargs = self.arguments(rows)
        device = self.setting.job.device
        inputs = (*(state.to(device) for state in states), *args)
        with quantized_inputs(self.group, rounded.activations):
            found: States = functional_call(self.group, dict(rounded.parameters), inputs, dict(kwargs))
        return found

    def pass_on(self, states: States, out: States, rounded: RoundedLayers = CLEAN) -> None:
        """Run all rows; no gradient.

        Args:
            states: what flows in, each `[rows, length, width]`.
            out: where the outputs go; may be `states`.
            rounded: weights and inputs that are replaced.
        """
        with torch.no_grad():
            for rows in self.batches():
                for to, found in zip(out, self.run(taken(states, rows), rows, rounded), strict=True):
                    to[rows.start : rows.stop] = found.to(to.device)

    def batches(self) -> Iterator[range]:
        """Numbers of the calibration rows, `batch_size` at a time: those that run together."""
        rows = self.setting.job.rows
        count = 0 if rows is None else len(rows.rows)
        for start in range(0, count, self.setting.batch_size):
            yield range(start, min(start + self.setting.batch_size, count))

    def observe(self, states: States, parts: Sequence[Part], masks: Tensor | None) -> None:
        """Measure the inputs of the layers of some parts while the unrounded block runs.

        Nothing runs where nobody asks: no range is searched, and none of an input is fixed.
        """
        names = {self._inside(name) for part in parts for name in part.layers if self.setting.search}
        linear = [n for n in sorted(names) if isinstance(self._owner(n), nn.Linear)]
        stacks = sorted(names.difference(linear))
        ranged = sorted({m for o in self.setting.options for m in to_calibrate(self._activations(parts, o))})
        mask_of: Callable[[], Tensor | None] = lambda: None if masks is None else masks[self.arguments.last]  # noqa: E731
        if not names and not ranged:
            return
        percentile = self.setting.job.options.calibration.act_percentile
        with (
            observe_inputs(self.group, [n.removesuffix(WEIGHT) for n in linear], mask_of) as moments,
            observe_ranges(self.group, ranged, mask_of, percentile) as extremes,
            observe_experts(self.group, mask_of, lambda: len(self.arguments.last), stacks) as experts,
            torch.no_grad(),
        ):
            for rows in self.batches():
                self.run(taken(states, rows), rows)
        sums = {n + WEIGHT: m for n, m in moments.items()} | dict(experts.moments)
        self.importance = {n: i for n, m in sums.items() if (i := m.importance()) is not None}
        self.ranges = settle_ranges({name: seen.value() for name, seen in extremes.items()})

    def rounded(self, part: Part, option: int) -> RoundedLayers:
        """The block with a part rounded by an option.

        Raises:
            NumericsError: a weight is not finite.
        """
        job, plan = self.setting.job, self.setting.candidates.plans[option]
        formats: dict[str, Format] = {}
        efforts: dict[str, Effort | None] = {}
        for name in part.layers:
            scheme = plan.scheme_of(name)
            fmt = None if scheme is None else scheme.weight_format()
            if scheme is not None and fmt is not None:
                formats[self._inside(name)] = fmt
                efforts[self._inside(name)] = self.setting.effort(scheme.bits)
        activations = self.ranges.formats(self._activations([part], option))
        parameters, rounds = {}, {owner_of(name) for name in activations}
        for name, fmt in bound_formats(formats, self.originals).items():
            weight, importance = self.originals[name], self.importance.get(name)
            q = round_matrix(name, weight, fmt, job.device, importance, efforts[name])
            dtype = computes_in(self.group, name)
            parameters[name] = as_read(q, weight.dtype, dtype, name.removesuffix(WEIGHT) in rounds)
        return RoundedLayers(parameters, activations)

    def _activations(self, parts: Sequence[Part], option: int) -> dict[str, InputFormat]:
        job, candidates = self.setting.job, self.setting.candidates
        layers = [candidates.layers[name] for part in parts for name in part.layers]
        return formats_inside(candidates.plans[option], layers, {"0": job.source.blocks[self.index].module})

    def _inside(self, name: str) -> str:
        return inside_group(self.setting.job, [self.index], self.setting.candidates.layers[name])

    def _owner(self, parameter: str) -> nn.Module:
        return self.group.get_submodule(parameter.rpartition(".")[0])


@contextmanager
def open_block(
    setting: ScoringSetting, index: int, table: ArgumentTable, parts: Sequence[Part]
) -> Iterator[OpenBlock]:
    """Read a block for as long as the context lasts.

    Args:
        setting: what is measured.
        index: of the block.
        table: arguments of all blocks for all rows.
        parts: parts of this block that will be rounded.

    Raises:
        NumericsError: a weight is not finite; names the tensor.
    """
    job = setting.job
    with job.source.block(index, job.device) as block:
        group = BlockGroup([block], [job.source.blocks[index].flow])
        refuse_not_finite(group, {"0": job.source.blocks[index].module})
        layers = [setting.candidates.layers[name] for part in parts for name in part.layers]
        names = {inside_group(job, [index], layer) for layer in layers}
        originals = {name: group.get_parameter(name).detach() for name in names}
        cast_group(job, group, [index])
        yield OpenBlock(setting, index, group, originals, GroupArguments(table, [index], job.device))
    release_freed_memory()


def taken(states: States, rows: range) -> States:
    """Some rows of what flows."""
    return tuple(state[rows.start : rows.stop] for state in states)
