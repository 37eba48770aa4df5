"""One group of blocks: read, tuned, written, and both streams moved past it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.calibration.observe import InputMoments, observe_inputs
from auto_round.errors import InternalError, NumericsError, Refusal, UnsupportedError
from auto_round.facts.layer import Layer
from auto_round.numerics.format import Format
from auto_round.numerics.importance import Importance
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.numerics.token_weights import Massive, massive_tokens, token_energy, token_weights
from auto_round.pipeline.activations import formats_inside
from auto_round.pipeline.arguments import ArgumentTable
from auto_round.pipeline.group import BlockGroup, GroupArguments
from auto_round.pipeline.hard_cases import by_kind, relative_error
from auto_round.pipeline.input_squares import InputSquares
from auto_round.pipeline.job import Job
from auto_round.pipeline.predictions import judged
from auto_round.pipeline.streams import Streams
from auto_round.tuning.objective import Objective
from auto_round.tuning.quantized_inputs import quantized_inputs
from auto_round.tuning.samples import Samples, run_block
from auto_round.tuning.sign_round import TunedBlock, tune_block
from auto_round.tuning.weights import WeightTask


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What one group of blocks became.

    Attributes:
        layers: quantized layers by name.
        others: retrained norm weights and biases by module parameter name.
        tuned: losses and the step kept.
        inputs: name of a tensor in the source -> what flowed into it; empty unless that is to be written.
        massive: tokens with massive activations in the unquantized output.
        errors: kind of layer -> share of its output that rounding changed, see `hard_cases`.
    """

    layers: Mapping[str, tuple[Layer, QuantizedLayer]]
    others: Mapping[str, Tensor]
    tuned: TunedBlock
    inputs: Mapping[str, InputSquares]
    massive: Massive
    errors: Mapping[str, float]


def tune_group(
    job: Job, indices: Sequence[int], table: ArgumentTable, streams: Streams, objective: Objective
) -> GroupResult:
    """Quantize the layers of some neighbouring blocks and move both streams past them.

    Args:
        job: the run.
        indices: indices of the blocks, in order.
        table: arguments of all blocks for all rows.
        streams: hidden states before the first of these blocks; replaced by those after the last.
        objective: what tuning differentiates; the last block may be judged otherwise.

    Raises:
        NumericsError: a weight or the loss is not finite; names the tensor.
    """
    with ExitStack() as stack:
        blocks = [stack.enter_context(job.source.block(i, job.device)) for i in indices]
        group = BlockGroup(blocks)
        formats = _formats(job, indices)
        prefixes = {str(p): job.source.blocks[i].module for p, i in enumerate(indices)}
        _refuse_not_finite(group, prefixes)
        originals = {name: group.get_parameter(name).detach() for name in formats}
        _cast(job, group, indices)
        arguments = GroupArguments(table, indices, job.device)
        observed = _observed(job, indices, group, formats)
        targets, moments = _references(job, group, observed, streams, arguments)
        energy = torch.stack([token_energy(row) for row in targets])
        weights = token_weights(energy, streams.masks)
        importance = {n: found for n, m in moments.items() if (found := m.importance()) is not None}
        stack.enter_context(quantized_inputs(group, formats_inside(job.plan, job.source.layers, prefixes)))
        inputs = streams.quantized if job.options.tune.enable_quanted_input else streams.reference
        tunable = streams.tuned > 0 and not any(table.skipped(i) for i in indices)
        held_out = GroupArguments(table, indices, job.device, first_row=streams.tuned)
        tuned = tune_block(
            group,
            {n: WeightTask(formats[n], originals[n], importance.get(n)) for n in formats},
            _samples(inputs, targets, arguments, weights, slice(0, streams.tuned)),
            _samples(inputs, targets, held_out, weights, slice(streams.tuned, None)),
            job.tune if tunable else replace(job.tune, iters=0),
            generator=torch.Generator().manual_seed(job.options.calibration.seed + indices[0]),
            objective=stack.enter_context(judged(job, indices, objective)),
        )
        dtypes = {name: parameter.dtype for name, parameter in group.named_parameters()}
        parameters = {n: q.format.dequantize(q, dtypes[n]) for n, q in tuned.weights.items()}
        errors = {
            name: relative_error(
                rounded, originals[name], importance[name].squares if name in importance else None
            )
            for name, rounded in parameters.items()
        }
        parameters.update({n: p.to(dtypes[n]) for n, p in tuned.others.items()})
        _advance(job, group, parameters, streams, targets, arguments)
    layers = _layers_of(job, indices, tuned.weights)
    others = {_outside(name, prefixes): value for name, value in tuned.others.items()}
    seen = _inputs_of(job, indices, importance, moments) if job.saves_imatrix else {}
    massive = massive_tokens(energy, streams.masks)
    return GroupResult(layers, others, tuned, seen, massive, by_kind(errors))


def _samples(
    inputs: Tensor,
    targets: Tensor | None,
    arguments: GroupArguments,
    weights: Tensor | None = None,
    rows: slice = slice(None),
) -> Samples:
    wanted = inputs if targets is None else targets
    return Samples(inputs[rows], wanted[rows], arguments, None if weights is None else weights[rows])


def _formats(job: Job, indices: Sequence[int]) -> dict[str, Format]:
    """Parameter name inside the group -> format; one format for all matrices inside a fused parameter."""
    found: dict[str, Format] = {}
    kept: set[str] = set()
    for layer in job.source.layers:
        if layer.block not in indices:
            continue
        name = _inside(job, indices, layer)
        fmt = job.plan.format_of(layer.name)
        if fmt is None or found.setdefault(name, fmt) != fmt:
            kept.add(name)
    mixed = sorted(kept & found.keys())
    if mixed:
        reason = (
            f"{mixed[0]} holds several matrices in one parameter, and the plan gives them different schemes"
        )
        raise UnsupportedError(
            "fused experts must share one scheme",
            [Refusal("tuning", reason, "give all experts of a layer one scheme")],
        )
    return found


def _inside(job: Job, indices: Sequence[int], layer: Layer) -> str:
    """Name of a layer's parameter inside the group."""
    if layer.block is None:
        raise InternalError(f"{layer.name} lies outside the blocks")
    prefix = job.source.blocks[layer.block].module
    return f"{list(indices).index(layer.block)}.{layer.parameter.removeprefix(prefix + '.')}"


def _refuse_not_finite(group: BlockGroup, prefixes: Mapping[str, str]) -> None:
    """Look at every weight before it spoils activations, whose errors would name no tensor."""
    for name, parameter in group.named_parameters():
        count = parameter.numel() - int(parameter.isfinite().sum())
        if count:
            raise NumericsError(
                f"{_outside(name, prefixes)}: {count} of {parameter.numel()} weights are NaN or infinite; "
                "expected finite ones: fetch the model again"
            )


def _cast(job: Job, group: BlockGroup, indices: Sequence[int]) -> None:
    """Bring a group to the dtypes in which it computes; routers and the like may ask for float32."""
    for position, index in enumerate(indices):
        dtypes = job.source.block_dtypes(index, job.dtype)
        block = group.get_submodule(str(position))
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))


def _outside(name: str, prefixes: Mapping[str, str]) -> str:
    position, _, rest = name.partition(".")
    return f"{prefixes[position]}.{rest}"


def _observed(
    job: Job, indices: Sequence[int], group: BlockGroup, formats: Mapping[str, Format]
) -> list[str]:
    """Linear modules whose inputs matter: quantized ones for the search, kept ones too for a file."""
    names = list(formats) if job.tune.search else []
    if job.saves_imatrix:
        names = [_inside(job, indices, layer) for layer in job.source.layers if layer.block in indices]
    unique = dict.fromkeys(n for n in names if isinstance(_owner(group, n), nn.Linear))
    return [n.removesuffix(".weight") for n in unique]


def _references(
    job: Job, group: BlockGroup, observed: Sequence[str], streams: Streams, arguments: GroupArguments
) -> tuple[Tensor, dict[str, InputMoments]]:
    """Outputs of the unquantized group, and by parameter the second moments of its inputs.

    The channels are observed on the unquantized stream, over the rows that are tuned on.
    """
    everything = _samples(streams.reference, None, arguments)
    run = partial(
        run_block,
        group,
        everything,
        batch_size=job.tune.pass_rows,
        device=job.device,
    )
    targets = streams.targets
    masks = streams.masks
    with observe_inputs(group, observed, None if masks is None else lambda: masks[arguments.last]) as seen:
        run(targets, rows=range(streams.tuned))
    run(targets, rows=range(streams.tuned, streams.rows))
    return targets, {f"{name}.weight": moments for name, moments in seen.items()}


def _inputs_of(
    job: Job,
    indices: Sequence[int],
    importance: Mapping[str, Importance],
    moments: Mapping[str, InputMoments],
) -> dict[str, InputSquares]:
    """What flowed into each matrix of the blocks, by its name in the source."""
    found: dict[str, InputSquares] = {}
    for layer in job.source.layers:
        if layer.block in indices and (name := _inside(job, indices, layer)) in importance:
            found[layer.tensor] = InputSquares(importance[name].squares.cpu(), moments[name].count)
    return found


def _owner(group: BlockGroup, parameter: str) -> nn.Module:
    return group.get_submodule(parameter.rpartition(".")[0])


def _advance(
    job: Job,
    group: BlockGroup,
    parameters: Mapping[str, Tensor],
    streams: Streams,
    targets: Tensor,
    arguments: GroupArguments,
) -> None:
    """Replace both streams by the outputs of the unquantized and of the quantized group."""

    def quantized(hidden: Tensor, *args: object) -> Tensor:
        output: Tensor = functional_call(group, dict(parameters), (hidden, *args))
        return output

    inputs = _samples(streams.quantized, None, arguments)
    run_block(
        quantized,
        inputs,
        streams.quantized,
        batch_size=job.tune.pass_rows,
        device=job.device,
        rows=range(streams.rows),
    )
    streams.reference.copy_(targets)


def _layers_of(
    job: Job, indices: Sequence[int], weights: Mapping[str, QTensor]
) -> dict[str, tuple[Layer, QuantizedLayer]]:
    """Quantized layers by their names on disk; fused parameters are cut into their matrices."""
    found: dict[str, tuple[Layer, QuantizedLayer]] = {}
    for layer in job.source.layers:
        if layer.block in indices and job.plan.format_of(layer.name) is not None:
            weight = cut(weights[_inside(job, indices, layer)], layer)
            found[layer.name] = (layer, QuantizedLayer(weight))
    return found


def cut(q: QTensor, layer: Layer) -> QTensor:
    """The part of a (fused) quantized parameter that is one layer."""
    if layer.expert is None and layer.rows is None:
        return q
    rows = slice(None) if layer.rows is None else slice(*layer.rows)
    expert = () if layer.expert is None else (layer.expert,)
    # One scale for a whole matrix holds for each of its halves too.
    scaled = slice(None) if q.format.group.size == 0 else rows
    scale = q.format.rule.read({name: part[(*expert, scaled)] for name, part in q.scale.parts.items()})
    return QTensor(q.codes[(*expert, rows)], scale, q.format)
