"""One unit of tuning: neighbouring blocks that are tuned together, and the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from auto_round.calibration.observe import InputExtremes, InputMoments, observe_inputs
from auto_round.calibration.observe_experts import (
    ExpertMoments,
    observe_experts,
    observe_ranges,
)
from auto_round.facts.attention import Attention
from auto_round.facts.flow import States
from auto_round.facts.inputs import WEIGHT, owner_of
from auto_round.models.divided_experts import whole_names
from auto_round.models.matrix_experts import computes_in, matrix_experts, using
from auto_round.numerics.activation import ActivationFormat
from auto_round.numerics.activation_float import InputFormat
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.head_steps import HeadSteps
from auto_round.numerics.importance import AnyImportance
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.token_weights import Massive, massive_tokens, token_energy, token_weights
from auto_round.pipeline.deciding.activations import to_calibrate
from auto_round.pipeline.machine.memory import release_freed_memory
from auto_round.pipeline.running.attention_states import StateRanges, observe_states, rounded_states
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.block_group import BlockGroup, GroupArguments
from auto_round.pipeline.running.hard_cases import matrix_errors, share_of_error
from auto_round.pipeline.running.input_ranges import InputRanges, settle_ranges
from auto_round.pipeline.running.seen_together import SummedMoments, join_ranges, pieces
from auto_round.pipeline.running.shared_numbers import bind_tied, tied_layers
from auto_round.pipeline.running.streams import Streams
from auto_round.ranks.ranks import Ranks, own_rows
from auto_round.schemes.attention import AttentionPlan
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.objective import PLAIN, Objective
from auto_round.tuning.quantized_inputs import quantized_inputs
from auto_round.tuning.samples import Samples, run_block
from auto_round.tuning.sign_round import TunedBlock, tune_block
from auto_round.tuning.stacks import CodedStack
from auto_round.tuning.steps import worth_cancelling
from auto_round.tuning.weights import WeightTask, measured


@dataclass(frozen=True, slots=True)
class Unit:
    """Blocks that are tuned as one, on their device and in the dtypes in which they compute.

    Attributes:
        group: the blocks.
        originals: parameters to quantize, before any cast.
        formats: what they are rounded to.
        activations: input in the group (`facts.inputs`) -> what it is rounded to.
        observed: modules of the group whose inputs are measured.
        observed_experts: parameters of fused experts whose inputs are measured.
        table: what the blocks are called with beside what flows, for every row.
        blocks: their indices in the table.
        device: where they are.
        percentile: percent of the tokens that a range of inputs has to hold.
        attentions: attention modules of the group that get scales.
        caches: which scales; None for none.
    """

    group: BlockGroup
    originals: Mapping[str, Tensor]
    formats: Mapping[str, Format]
    activations: Mapping[str, InputFormat]
    observed: Sequence[str]
    table: ArgumentTable
    blocks: Sequence[int]
    device: torch.device
    observed_experts: Sequence[str] = ()
    percentile: float = 100.0
    attentions: Mapping[str, Attention] = field(default_factory=dict)
    caches: AttentionPlan | None = None

    def arguments(self, first_row: int = 0) -> GroupArguments:
        """Arguments of the group for rows of the table, counted from `first_row`."""
        return GroupArguments(self.table, self.blocks, self.device, first_row)

    @property
    def runs(self) -> bool:
        """Whether the model runs all of the blocks."""
        return not any(self.table.skipped(block) for block in self.blocks)

    def rounds_input_of(self, weight: str) -> bool:
        """Whether what a parameter is multiplied by is rounded too."""
        return weight.removesuffix(WEIGHT) in {owner_of(name) for name in self.activations}


@dataclass(frozen=True, slots=True)
class TunedUnit:
    """Result of tuning a unit.

    Attributes:
        tuned: codes, retrained parameters, losses and the step kept.
        parameters: everything that changed, as the blocks compute with it from now on.
        importance: parameter -> second moments of its inputs.
        moments: parameter -> the sums that they were computed from, with the number of tokens.
        massive: tokens with massive activations in the unquantized output, in the first tensor of it.
        errors: parameter -> relative error of its output, see `hard_cases.share_of_error`.
        ranges: module -> extremes of its input, where the step of the input follows from them.
        activations: module -> what its input is rounded to, with that step.
        states: attention module -> part -> its steps, where these are calibrated.
        experts: module of fused experts -> tokens that reached each of them.
    """

    tuned: TunedBlock
    parameters: Mapping[str, Tensor]
    importance: Mapping[str, AnyImportance]
    moments: Mapping[str, InputMoments | ExpertMoments]
    massive: Massive
    errors: Mapping[str, float]
    ranges: InputRanges
    activations: Mapping[str, ActivationFormat]
    states: Mapping[str, Mapping[str, HeadSteps]]
    experts: Mapping[str, list[int]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was measured as the unquantized blocks ran, over the rows that are tuned on.

    Attributes:
        moments: parameter -> sums of squares and of products of its inputs.
        extremes: module -> extremes of its input, where the step of the input follows from them.
        states: attention module -> what was seen of its states.
        experts: module -> tokens that reached each of its experts.
    """

    moments: Mapping[str, InputMoments | ExpertMoments]
    extremes: Mapping[str, InputExtremes]
    states: Mapping[str, StateRanges]
    experts: Mapping[str, list[int]]


def _nothing() -> None:
    """Nothing is begun."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What comes before the tuning of a unit, and beside it.

    Attributes:
        seen: what was measured as its unquantized blocks ran, where they have run already: the targets are
            those that they gave. None: they are run now.
        then: called once the targets are known.
    """

    seen: Seen | None = None
    then: Callable[[], None] = _nothing


ALL_TO_DO = Turn()
"""Nothing is known yet, and nothing is done beside."""


def tune_unit(
    unit: Unit,
    streams: Streams,
    config: TuneConfig,
    *,
    generator: torch.Generator,
    objective: Objective = PLAIN,
    from_quantized: bool = True,
    turn: Turn = ALL_TO_DO,
) -> TunedUnit:
    """Quantize some blocks and move both streams past them; the blocks themselves stay as they are.

    Args:
        unit: the blocks and what to do with them.
        streams: what flows in before the first of the blocks; replaced by what flows out after the last.
        config: settings of the loop.
        generator: source of the order of samples (on the host).
        objective: what is differentiated.
        from_quantized: tune on what the quantized blocks before give, rather than the unquantized ones.
        turn: what is known already, and what is done beside.

    Raises:
        NumericsError: a weight, an activation or the loss is not finite.
        UnsupportedError: the number of an input follows from calibration, and no token reached the layer.
    """
    group, arguments = unit.group, unit.arguments()
    ranks = objective.ranks
    seen = turn.seen or references(unit, streams, config, ranks)
    turn.then()
    release_freed_memory()
    importance = {n: found for n, m in seen.moments.items() if (found := m.importance()) is not None}
    targets = streams.targets[: group.flowing]  # what else is handed on has no share in the loss
    energies = [torch.stack([token_energy(row) for row in target]) for target in targets]
    weights = tuple(token_weights(energy, streams.mask_of(i)) for i, energy in enumerate(energies))
    ranges = settle_ranges({name: ends.value() for name, ends in seen.extremes.items()})
    activations = ranges.formats(unit.activations)
    steps = _state_steps(unit, seen.states)
    formats = bound_formats(unit.formats, unit.originals)
    inputs = streams.quantized if from_quantized else streams.reference
    count = streams.tuned
    grids, rounds_inputs = [fmt.grid for fmt in formats.values()], bool(activations or steps)
    cancels = worth_cancelling(config.iters, grids, rounds_inputs=rounds_inputs)
    with quantized_inputs(group, activations), rounded_states(group, steps):
        tuned = tune_block(
            group,
            {n: WeightTask(fmt, unit.originals[n], importance.get(n)) for n, fmt in formats.items()},
            _samples(inputs, targets, weights, arguments, slice(0, count)),
            _samples(inputs, targets, weights, unit.arguments(count), slice(count, None)),
            replace(config, try_cancelled=cancels, iters=config.iters if count and unit.runs else 0),
            generator=generator,
            objective=replace(objective, device=unit.device),
        )
        dtypes = {name: computes_in(group, name) for name, _ in group.named_parameters()}
        rounded: dict[str, Tensor | CodedStack] = {
            n: _as_multiplied(unit, n, q, dtypes[n]) for n, q in tuned.weights.items()
        }
        retrained = {n: p.to(dtypes[n]) for n, p in tuned.others.items()}
        _advance(unit, rounded | retrained, streams, config.pass_rows, ranks)
    massive, errors = massive_tokens(energies[0], streams.masks), _errors(unit, rounded, importance)
    both = {n: w for n, w in rounded.items() if isinstance(w, Tensor)} | retrained
    return TunedUnit(
        tuned, both, importance, seen.moments, massive, errors, ranges, activations, steps, seen.experts
    )


def _as_multiplied(unit: Unit, name: str, q: QTensor, dtype: torch.dtype) -> Tensor | CodedStack:
    """A rounded weight as the block multiplies by it from now on; stacks of matrices stay codes."""
    own, rounds = unit.originals[name].dtype, unit.rounds_input_of(name)
    if unit.originals[name].device.type == "cpu" and matrix_experts(unit.group, name) is not None:
        return CodedStack(q, _held(q, own, dtype, rounds))
    return as_read(q, own, dtype, rounds).to(unit.originals[name].device)


def _state_steps(unit: Unit, seen: Mapping[str, StateRanges]) -> dict[str, dict[str, HeadSteps]]:
    """Attention module -> part -> its steps, where these are calibrated."""
    if unit.caches is None:
        return {}
    return {name: seen[name].steps(unit.caches, attention) for name, attention in unit.attentions.items()}


def _errors(
    unit: Unit, rounded: Mapping[str, Tensor | CodedStack], importance: Mapping[str, AnyImportance]
) -> dict[str, float]:
    """Share of each layer's output that rounding changed, by the name of its weight, pieces together."""
    whole, found = whole_names(unit.group), dict[str, dict[int, tuple[float, float]]]()
    for name, value in rounded.items():
        originals = unit.originals[name].reshape(-1, *unit.originals[name].shape[-2:])
        squares = importance[name].squares if name in importance else None
        if isinstance(value, Tensor):
            matrices: Iterable[Tensor] = value.reshape(originals.shape)
        else:
            matrices = map(partial(value.matrix, dtype=computes_in(unit.group, name)), range(len(originals)))
        parts = matrix_errors(zip(matrices, originals, strict=True), squares)
        owner, experts = whole.get(name, (name, range(len(parts))))
        found.setdefault(owner, {}).update(zip(experts, parts, strict=True))
    return {name: share_of_error([parts[i] for i in sorted(parts)]) for name, parts in found.items()}


def as_read(q: QTensor, own: torch.dtype, dtype: torch.dtype, rounds_inputs: bool) -> Tensor:
    """A rounded weight as readers of folders multiply it.

    A floating code times its step has more bits than 16-bit models hold, and readers unpack floating weights
    to the model's dtype. Where blocks run in float32 the difference shows once inputs are rounded as
    coarsely: on a trained model of eight blocks a KL of 0.03 with FP4 and of 0.003 with FP8, half of what
    all rounding did.

    Args:
        q: codes and scale.
        own: dtype of the weight in the model.
        dtype: dtype in which the block runs.
        rounds_inputs: what the weight is multiplied by is rounded too.
    """
    return q.format.dequantize(q, _held(q, own, dtype, rounds_inputs)).to(dtype)


def _held(q: QTensor, own: torch.dtype, dtype: torch.dtype, rounds_inputs: bool) -> torch.dtype:
    """Dtype to which readers unpack a weight; arguments as for `as_read`."""
    return own if rounds_inputs and isinstance(q.format.grid, FloatGrid) else dtype


def bound_formats(formats: Mapping[str, Format], originals: Mapping[str, Tensor]) -> dict[str, Format]:
    """The formats, those of weights that share a number bound to the ranges of all of them.

    Args:
        formats: parameter -> format.
        originals: parameter -> weight.

    Raises:
        NumericsError: a weight is not finite; names it.
    """
    modules = {name.removesuffix(WEIGHT): name for name in formats}
    inside = {module: formats[name] for module, name in modules.items()}
    tied = tied_layers(inside)
    stats = {m: measured(modules[m], inside[m], originals[modules[m]]) for names in tied for m in names}
    return {modules[module]: fmt for module, fmt in bind_tied(inside, tied, stats).items()}


def _samples(
    inputs: States, targets: States, weights: tuple[Tensor, ...], arguments: GroupArguments, rows: slice
) -> Samples:
    inside, wanted, each = (tuple(x[rows] for x in states) for states in (inputs, targets, weights))
    return Samples(inside, wanted, arguments, each, arguments.kind)


def references(unit: Unit, streams: Streams, config: TuneConfig, ranks: Ranks) -> Seen:
    """Run the unquantized blocks: their outputs become the targets, what flows in them is measured."""
    arguments = unit.arguments()
    everything = Samples(streams.reference, streams.reference, arguments, kind=arguments.kind)
    masks, tuned = streams.masks, range(streams.tuned)
    mask_of = None if masks is None else lambda: masks[arguments.last]
    run = partial(run_block, unit.group, everything, streams.targets, device=unit.device)
    summed = SummedMoments(ranks)
    ranged = to_calibrate(unit.activations)
    with (
        observe_ranges(unit.group, ranged, mask_of, unit.percentile) as extremes,
        observe_states(unit.group, list(unit.attentions), mask_of) as states,
    ):
        for place, piece in pieces(ranks, own_rows(ranks, tuned), config.by_row):
            with (
                observe_inputs(unit.group, unit.observed, mask_of) as seen,
                observe_experts(
                    unit.group, mask_of, lambda: len(arguments.last), unit.observed_experts
                ) as experts,
            ):
                run(batch_size=config.pass_rows, rows=piece)
            summed.add(place, seen, experts)
    rest = range(streams.tuned, streams.rows)
    run(batch_size=config.pass_rows, rows=own_rows(ranks, rest))
    ranks.share(streams.targets, tuned)
    ranks.share(streams.targets, rest)
    moments, tokens = summed.of_all()
    join_ranges(ranks, extremes, states)
    return Seen(
        {name + WEIGHT if name in unit.observed else name: each for name, each in moments.items()},
        extremes,
        states,
        {name: counts.tolist() for name, counts in tokens.items() if counts.any()},
    )


def _advance(
    unit: Unit, parameters: Mapping[str, Tensor | CodedStack], streams: Streams, at_once: int, ranks: Ranks
) -> None:
    """Replace both streams by the outputs of the unquantized and of the quantized blocks."""
    whole = {n: p for n, p in parameters.items() if isinstance(p, Tensor)}
    stacks = {n: p for n, p in parameters.items() if not isinstance(p, Tensor)}

    def quantized(*inputs: object) -> States:
        with using(unit.group, stacks):
            output: States = functional_call(unit.group, whole, inputs)
        return output

    arguments = unit.arguments()
    everything = Samples(streams.quantized, streams.quantized, arguments, kind=arguments.kind)
    rows = range(streams.rows)
    own = own_rows(ranks, rows)
    streams.between = False
    run_block(quantized, everything, streams.quantized, batch_size=at_once, rows=own, device=unit.device)
    ranks.share(streams.quantized, rows)
    streams.advance()
    streams.between = True
