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

from auto_round.tuning.objective import block_outputs
from auto_round.tuning.samples import Batch


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
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(output) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=output.device)
        for start in range(0, len(output), at_once):
            part = slice(start, start + at_once)
            expected = finish(target[part].unsqueeze(0)).float().log_softmax(-1)
            with torch.set_grad_enabled(wants_gradient):
                hidden = output[part].detach().requires_grad_(wants_gradient)
                found = finish(hidden.unsqueeze(0)).float().log_softmax(-1)
                divergence = nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(divergence, hidden)
            total += divergence.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None
