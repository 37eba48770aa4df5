"""One group of neighbouring blocks: its weights are read and tuned, and both streams move past it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from auto_round.calibration.observe import InputMoments
from auto_round.calibration.observe_experts import ExpertMoments
from auto_round.errors import InternalError, NumericsError
from auto_round.facts.attention import Attention
from auto_round.facts.group_names import inside, outside, prefixes_of
from auto_round.facts.inputs import input_of
from auto_round.facts.layer import Layer
from auto_round.facts.tensor import MATRIX
from auto_round.models.divided_experts import name_in_piece, whole_names
from auto_round.models.matrix_experts import matrix_experts
from auto_round.models.source import CPU
from auto_round.numerics.activation import ActivationFormat
from auto_round.numerics.activation_float import FixedScale
from auto_round.numerics.activation_int import FixedInt
from auto_round.numerics.format import Format
from auto_round.numerics.importance import AnyImportance
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.numerics.token_weights import Massive
from auto_round.pipeline.deciding.activations import formats_inside
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.block_group import BlockGroup
from auto_round.pipeline.running.hard_cases import by_kind
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.pipeline.running.input_squares import InputSquares
from auto_round.pipeline.running.last_block import by_predictions
from auto_round.pipeline.running.placed import divide_modules, put_modules
from auto_round.pipeline.running.streams import Streams
from auto_round.pipeline.running.unit import ALL_TO_DO, Turn, Unit, tune_unit
from auto_round.tuning.objective import Objective
from auto_round.tuning.sign_round import TunedBlock


@dataclass(frozen=True, slots=True)
class GroupTuning:
    """How groups of blocks are tuned, the same for all of them.

    Attributes:
        objective: what tuning differentiates.
        seed: of the batches' order; each group adds the number of its first block.
        from_quantized: the blocks see what the quantized ones before them give, not the unquantized ones.
        positions: the last block is tuned by the model's predictions, so many positions at a time; 0 for by
            its output, like all others.
    """

    objective: Objective
    seed: int
    from_quantized: bool = True
    positions: int = 0


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What one group of blocks became.

    Attributes:
        layers: quantized layers by name.
        others: retrained norm weights and biases by module parameter name.
        tuned: losses and the step kept.
        inputs: name of a matrix in the source -> mean squares of its inputs; empty unless a file of them is
            asked for.
        massive: tokens with massive activations in the unquantized output.
        errors: kind of layer -> relative error of its output, see `hard_cases.share_of_error`.
        ranges: module -> extremes of its input, where the step of the input follows from them.
        states: attention -> part -> its steps as stored, where these are calibrated.
        experts: module of fused experts -> tuned tokens that reached each of them.
    """

    layers: Mapping[str, tuple[Layer, QuantizedLayer]]
    others: Mapping[str, Tensor]
    tuned: TunedBlock
    inputs: Mapping[str, InputSquares]
    massive: Massive
    errors: Mapping[str, float]
    ranges: InputRanges
    states: Mapping[Attention, Mapping[str, Tensor]]
    experts: Mapping[str, list[int]]


def tune_group(
    job: Job,
    indices: Sequence[int],
    table: ArgumentTable,
    streams: Streams,
    how: GroupTuning,
    turn: Turn = ALL_TO_DO,
) -> GroupResult:
    """Quantize the layers of some neighbouring blocks and move both streams past them.

    Args:
        job: the run.
        indices: indices of the blocks, in order.
        table: arguments of all blocks of their list for all rows.
        streams: hidden states before the first of these blocks; replaced by those after the last.
        how: what is the same for all groups.
        turn: what is known of these blocks already, and what is done beside.

    Raises:
        NumericsError: a weight or the loss is not finite; names the tensor.
    """
    prefixes = prefixes_of(job.source.blocks, indices)
    with ExitStack() as stack:
        objective = how.objective
        if how.positions and indices[-1] == len(job.source.blocks) - 1:
            last = by_predictions(job.source, job.device, job.dtype, objective, how.positions)
            objective = stack.enter_context(last)
        unit = stack.enter_context(opened_unit(job, indices, table))
        found = tune_unit(
            unit,
            streams,
            job.tune,
            generator=torch.Generator().manual_seed(how.seed + indices[0]),
            objective=objective,
            from_quantized=how.from_quantized,
            turn=turn,
        )
    layers = layers_of(job, indices, found.tuned.weights, found.activations)
    others = {outside(name, prefixes): value for name, value in found.tuned.others.items()}
    seen = _inputs_of(job, indices, found.importance, found.moments) if job.saves_imatrix else {}
    ranges = InputRanges(
        {outside(name, prefixes): ends for name, ends in found.ranges.extremes.items()},
        tuple(outside(name, prefixes) for name in found.ranges.borrowed),
    )
    attentions = _attentions(job, prefixes)
    states = {attentions[n]: {p: s.step for p, s in each.items()} for n, each in found.states.items()}
    experts = {outside(name, prefixes): counts for name, counts in found.experts.items()}
    errors = by_kind(found.errors)
    return GroupResult(layers, others, found.tuned, seen, found.massive, errors, ranges, states, experts)


@contextmanager
def opened_unit(job: Job, indices: Sequence[int], table: ArgumentTable) -> Iterator[Unit]:
    """Neighbouring blocks with their weights, read and put on their devices; freed on exit.

    Raises:
        NumericsError: a weight is not finite; names the tensor.
    """
    placed = job.placement if job.placement is not None and job.placement.several else None
    prefixes = prefixes_of(job.source.blocks, indices)
    with ExitStack() as stack:
        first_at = job.device if placed is None else CPU
        blocks = [stack.enter_context(job.source.block(i, first_at)) for i in indices]
        group = BlockGroup(blocks, [job.source.blocks[i].flow for i in indices])
        if placed is not None:
            divide_modules(group, placed.shares_inside(prefixes))
            put_modules(group, placed.devices_inside(prefixes), job.device)
        refuse_not_finite(group, prefixes)
        yield make_unit(job, indices, group, table)


def make_unit(job: Job, indices: Sequence[int], group: BlockGroup, table: ArgumentTable) -> Unit:
    """The group as a unit of tuning: formats found, and blocks cast to the dtypes in which they compute."""
    formats = _formats(job, indices)
    first = job.source.block_lists[job.source.blocks[indices[0]].in_list][0].index
    prefixes = prefixes_of(job.source.blocks, indices)
    originals = {name: group.get_parameter(name).detach() for name in formats}
    cast_group(job, group, indices)
    observed = _observed(job, indices, formats)
    return Unit(
        group=group,
        originals=originals,
        formats=formats,
        activations=formats_inside(job.plan, job.source.layers, prefixes),
        observed=[n.removesuffix(".weight") for n in observed if isinstance(_owner(group, n), nn.Linear)],
        observed_experts=[n for n in observed if group.get_parameter(n).dim() > MATRIX],
        table=table,
        blocks=[index - first for index in indices],
        device=job.device,
        percentile=job.options.calibration.act_percentile,
        attentions=_attentions(job, prefixes),
        caches=job.caches,
    )


def _attentions(job: Job, prefixes: Mapping[str, str]) -> dict[str, Attention]:
    """Name inside the group -> attention module that gets scales."""
    modules = () if job.caches is None else job.caches.modules
    return inside({each.module: each for each in modules}, prefixes)


def _formats(job: Job, indices: Sequence[int]) -> dict[str, Format]:
    """Parameter name inside the group -> format, one for all matrices inside (`refuse_mixed_parameters`)."""
    found: dict[str, Format] = {}
    for layer in job.source.layers:
        fmt = job.plan.format_of(layer.name)
        if layer.block in indices and fmt is not None:
            found[_place_of(job, indices, layer)[0]] = fmt
    return found


def _place_of(job: Job, indices: Sequence[int], layer: Layer) -> tuple[str, int | None]:
    """Name of a layer's parameter inside the group, and its expert there: some are cut into pieces."""
    name = inside_group(job, indices, layer)
    piece = None if job.placement is None else job.placement.piece_of(layer)
    if piece is None:
        return name, layer.expert
    return name_in_piece(name, piece[0]), piece[1]


def inside_group(job: Job, indices: Sequence[int], layer: Layer) -> str:
    """Name of a layer's parameter inside the group."""
    if layer.block is None:
        raise InternalError(f"{layer.name} lies outside the blocks")
    prefix = job.source.blocks[layer.block].module
    return f"{list(indices).index(layer.block)}.{layer.parameter.removeprefix(prefix + '.')}"


def refuse_not_finite(group: BlockGroup, prefixes: Mapping[str, str]) -> None:
    """Refuse NaN and infinite weights here, where the tensor has a name: later only activations show them."""
    for name, parameter in group.named_parameters():
        parts = parameter.unbind() if parameter.dim() > MATRIX else (parameter,)  # marks take memory too
        # The extremes are NaN where one number is, and take a twentieth of the time of marks.
        ends = [end for part in parts if part.numel() for end in part.detach().aminmax()]
        if all(bool(end.isfinite()) for end in ends):
            continue
        count = parameter.numel() - sum(int(part.isfinite().sum()) for part in parts)
        if count:
            raise NumericsError(
                f"{outside(name, prefixes)}: {count} of {parameter.numel()} weights are NaN or infinite; "
                "expected finite ones: fetch the model again"
            )


def cast_group(job: Job, group: BlockGroup, indices: Sequence[int]) -> None:
    """Cast a group to the dtypes in which it computes; some parameters, such as routers', stay float32."""
    for position, index in enumerate(indices):
        dtypes = job.source.block_dtypes(index, job.dtype)
        block = group.get_submodule(str(position))
        whole = whole_names(block)
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            experts = matrix_experts(block, name) if tensor.dim() > MATRIX else None
            dtype = dtypes.get(whole[name][0] if name in whole else name, tensor.dtype)
            if experts is not None and tensor.device.type == "cpu":
                experts.keep(dtype)
            elif tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _observed(job: Job, indices: Sequence[int], formats: Mapping[str, Format]) -> list[str]:
    """Parameters whose inputs are measured: quantized ones for the search, all for an imatrix file."""
    names = list(formats) if job.tune.search else []
    if job.saves_imatrix:
        names = [_place_of(job, indices, layer)[0] for layer in job.source.layers if layer.block in indices]
    return list(dict.fromkeys(names))


def _inputs_of(
    job: Job,
    indices: Sequence[int],
    importance: Mapping[str, AnyImportance],
    moments: Mapping[str, InputMoments | ExpertMoments],
) -> dict[str, InputSquares]:
    """Name of a matrix in the source -> mean squares of its inputs, for the blocks of the group."""
    found: dict[str, InputSquares] = {}
    for layer in job.source.layers:
        name, expert = _place_of(job, indices, layer) if layer.block in indices else ("", None)
        if name in importance:
            of_stack = 0 if expert is None else expert
            seen, sums = importance[name].matrix(of_stack), moments[name].matrix(of_stack)
            if seen is not None:
                found[layer.alone] = InputSquares(seen.squares.cpu(), sums.count)
    return found


def _owner(group: BlockGroup, parameter: str) -> nn.Module:
    return group.get_submodule(parameter.rpartition(".")[0])


def layers_of(
    job: Job,
    indices: Sequence[int],
    weights: Mapping[str, QTensor],
    activations: Mapping[str, ActivationFormat],
) -> dict[str, tuple[Layer, QuantizedLayer]]:
    """Quantized layers by their names on disk; fused parameters are cut into their matrices.

    Args:
        job: the run.
        indices: of the blocks of a group.
        weights: parameter of the group -> codes and scale.
        activations: input in the group -> what it is rounded to.
    """
    found: dict[str, tuple[Layer, QuantizedLayer]] = {}
    for layer in job.source.layers:
        if layer.block in indices and job.plan.format_of(layer.name) is not None:
            name, expert = _place_of(job, indices, layer)
            index = () if expert is None else (expert,)
            rows = slice(None) if layer.rows is None else slice(*layer.rows)
            inputs = activations.get(input_of(name, expert))
            scale = inputs.number if isinstance(inputs, FixedScale) else None
            zero = inputs.zero if isinstance(inputs, FixedInt) else None
            found[layer.name] = (layer, QuantizedLayer(weights[name].take(index, rows), scale, zero))
    return found
