"""Tuning the last block by what the model says: the divergence of its predictions from the original's.

Between blocks nobody knows which errors matter, so all count alike. After the last one it is known: what the
norm and the head make of them.
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
    """Loss of a model's last block; takes the place of `objective.block_objective`.

    Attributes:
        finish: logits `[1, n, vocabulary]` of hidden states `[1, n, hidden]`, position by position;
            differentiable.
        at_once: positions whose logits are held at a time.
    """

    finish: Callable[[Tensor], Tensor]
    at_once: int

    def __call__(self, block: nn.Module, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Mean KL(original || block with other parameters), nats per position; as `block_objective` else.

        Only the first of the tensors that flow on says something. A divergence is bounded by what the model
        says, whatever an activation's size: every position counts alike unless its weight is 0.
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
    """Sum of KL(target || output) over positions `[n, hidden]`; logits are held for a few at a time.

    The gradient is found on the way forward, so that the logits need not be kept nor made again.
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
