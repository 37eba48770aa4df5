"""Loss of the last block: the divergence of the model's predictions from those of the original model.

The loss of all other blocks is a squared distance, since nobody knows there which errors of the hidden
states matter. Behind the last block only the norm and the head follow, so the predictions themselves can be
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.numerics.at_once import bands, weights_at_once
from auto_round.tuning.objective import block_outputs
from auto_round.tuning.samples import Batch

LOGITS = 1 << 18
"""Logits whose softmax a CPU takes at a time: a MiB of each of four tensors, which stay in its cache."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Loss of a model's last block, to be used instead of `objective.block_objective`.

    Attributes:
        finish: logits `[1, n, vocabulary]` of hidden states `[1, n, hidden]`, position by position;
            differentiable.
        at_once: positions whose logits are held at a time.
    """

    finish: Callable[[Tensor], Tensor]
    at_once: int

    def __call__(self, block: nn.Module, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Mean of `sum(p * (log p - log q))` over positions, nats per position; float32 scalar.

        `p = softmax(finish(target))` are the original model's predictions, with the sum over the vocabulary,
        and `q = softmax(finish(output))` those of the block with other parameters; `output` is the first of
        the tensors that flow on. Positions of weight 0 are left out and all others count alike: unlike a
        squared distance, a divergence does not grow with the size of activations. Arguments as for
        `objective.block_objective`.
        """
        output, target = block_outputs(block, parameters, batch)[0], batch.targets[0]
        weights, count = batch.weights[0], batch.counts[0]
        width = output.shape[-1]
        where = slice(None) if weights is None else weights.reshape(-1) > 0
        total: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
            output.reshape(-1, width)[where], target.reshape(-1, width)[where], self.finish, self.at_once
        )
        return total * (width / count)


class _Divergence(torch.autograd.Function):
    """Sum of KL(target || output) over positions `[n, hidden]`; logits are held for a few of them at a time.

    The forward pass computes the gradient too, so that logits are neither kept nor computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, target: Tensor, finish: Callable[[Tensor], Tensor], at_once: int
    ) -> Tensor:
        ends = Ends(finish, finish, at_once)
        total, gradient = summed_divergence(output, target, ends, gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


@dataclass(frozen=True, slots=True)
class Ends:
    """The ends of two models: what turns hidden states `[1, n, hidden]` into logits `[1, n, vocabulary]`.

    Attributes:
        found: of the model that is judged; differentiable.
        expected: of the original model.
        at_once: positions whose logits are held at a time.
    """

    found: Callable[[Tensor], Tensor]
    expected: Callable[[Tensor], Tensor]
    at_once: int


def summed_divergence(
    output: Tensor, target: Tensor, ends: Ends, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum over positions of the divergence of predictions from those of the original model, nats.

    Args:
        output: hidden states of the model that is judged, `[n, hidden]`.
        target: those of the original model, same shape.
        ends: what turns both into logits.
        gradient: also return the gradient in `output`.

    Returns:
        float32 scalar, and the gradient `[n, hidden]` in the dtype of `output`.
    """
    total = torch.zeros((), dtype=torch.float32, device=output.device)
    found_gradient = torch.empty_like(output) if gradient else None
    for start in range(0, len(output), ends.at_once):
        part = slice(start, start + ends.at_once)
        with torch.no_grad():
            expected = ends.expected(target[part].unsqueeze(0))[0]
        with torch.set_grad_enabled(gradient):
            hidden = output[part].detach().requires_grad_(gradient)
            found = ends.found(hidden.unsqueeze(0))[0]
        towards = torch.empty_like(found) if gradient else None
        total += _divergence(found.detach(), expected, towards)
        if found_gradient is not None:
            (found_gradient[part],) = torch.autograd.grad(found, hidden, towards)
    return total, found_gradient


def _divergence(found: Tensor, expected: Tensor, towards: Tensor | None) -> Tensor:
    """Sum over positions of `sum(p * (log p - log q))`, `p` of the expected logits and `q` of those found.

    Its gradient in the logits found is `q - p`. All of it is formed for a few positions at a time, while
    their numbers are in a core's cache.

    Args:
        found: logits `[n, vocabulary]`.
        expected: those of the original model.
        towards: takes the gradient in `found`; None where none is wanted.
    """
    total = torch.zeros((), dtype=torch.float32, device=found.device)
    positions, vocabulary = found.shape
    for rows in bands(positions, vocabulary, weights_at_once(found.device, LOGITS)):
        log_p, log_q = (logits[rows].float().log_softmax(-1) for logits in (expected, found))
        p = log_p.exp()
        total += log_p.sub_(log_q).mul_(p).sum()
        if towards is not None:
            torch.sub(log_q.exp_(), p, out=log_p)
            towards[rows] = log_p
    return total
