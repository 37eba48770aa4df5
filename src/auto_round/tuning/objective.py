"""What a tuning step differentiates: the rounding of weights, and the loss of the block's output.

The loss is the mean of `weight * (output - target)**2`, with the unquantized block's output as the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.facts.flow import States
from auto_round.models.expert_products import Matrices
from auto_round.models.matrix_experts import using
from auto_round.ranks.ranks import ALONE, Ranks
from auto_round.tuning.samples import Batch, states_of
from auto_round.tuning.weights import fake_weights


def block_objective(block: nn.Module, parameters: Mapping[str, Tensor | Matrices], batch: Batch) -> Tensor:
    """Loss of a block with other parameters; the module itself is not touched.

    Args:
        block: the module.
        parameters: rounded weights and retrained parameters by name; for stacks of matrices whoever has them.
        batch: what the block is called with, and what it should give.

    Returns:
        Sum of `block_loss` over all tensors that flow on; float32 scalar.
    """
    outputs = block_outputs(block, parameters, batch)
    losses = map(block_loss, outputs, batch.targets, batch.weights, batch.counts)
    return reduce(torch.add, losses)


def block_outputs(block: nn.Module, parameters: Mapping[str, Tensor | Matrices], batch: Batch) -> States:
    """What a block with other parameters hands on; arguments of `block_objective`."""
    dtype = batch.inputs[0].dtype
    values = {name: v.to(dtype) for name, v in parameters.items() if isinstance(v, Tensor)}
    stacks = {name: v for name, v in parameters.items() if not isinstance(v, Tensor)}
    with using(block, stacks):
        output = functional_call(block, values, (*batch.inputs, *batch.args), dict(batch.kwargs))
    return states_of(output, range(len(batch.targets)))


@dataclass(frozen=True, slots=True)
class Objective:
    """The functions of a tuning step; compiled ones may stand in.

    Attributes:
        rounding: `fake_weights`, for what is differentiated.
        loss: what is differentiated, with the arguments of `block_objective`.
        judge: the same loss of held-out samples, whose batches have other shapes: never compiled.
        rounds_again: weights are rounded a second time for the backward pass, one after another, so that
            nothing is kept of the first time: less memory, more time, the same result.
        device: where the block takes what flows; None for where its weights are. Weights may lie on several
            devices, if the block moves what flows to each of them and back.
        ranks: the processes among which the rows of a step are divided.
        matrix_by_matrix: the losses take stacks of matrices too, which compiled ones do not.
    """

    rounding: Callable[..., dict[str, Tensor]] = fake_weights
    loss: Callable[..., Tensor] = block_objective
    judge: Callable[..., Tensor] = block_objective
    rounds_again: bool = False
    device: torch.device | None = None
    ranks: Ranks = ALONE
    matrix_by_matrix: bool = True


PLAIN = Objective()
"""The functions of a tuning step for most blocks, not compiled."""


def block_loss(output: Tensor, target: Tensor, weights: Tensor | None, count: Tensor) -> Tensor:
    """Sum over all elements of the weighted squared difference, divided by `count`; float32 scalar.

    Args:
        output: `[batch, length, hidden]`.
        target: same shape.
        weights: `[batch, length]` float32; None for 1 everywhere. What stands at positions of weight 0 has
            no influence, not even NaN.
        count: float32 scalar, see `counted_elements`.
    """
    loss: Tensor = _SquaredDistance.apply(output, target, weights, count)  # type: ignore[no-untyped-call]
    return loss


class _SquaredDistance(torch.autograd.Function):
    """Few passes over memory: the difference is formed once, in float32, and serves both directions."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, weights: Tensor | None, count: Tensor) -> Tensor:
        difference = output.to(torch.float32, copy=True).sub_(target)
        weighted = difference
        if weights is not None:
            each = weights.unsqueeze(-1)
            # Filled rather than multiplied: what stands at padding may be NaN, and 0 * NaN is NaN.
            difference.masked_fill_(each == 0, 0.0)
            weighted = difference * each
        ctx.save_for_backward(weighted, count)
        ctx.dtype = output.dtype
        return torch.dot(difference.reshape(-1), weighted.reshape(-1)) / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weighted, count = ctx.saved_tensors
        return (weighted * (grad * (2.0 / count))).to(ctx.dtype), None, None, None
