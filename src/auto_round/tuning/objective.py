"""Loss of a block: mean squared difference to the unquantized block's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def block_loss(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the counted elements of the squared difference, float32 scalar.

    Args:
        output: `[batch, length, hidden]`.
        target: same shape.
        mask: `[batch, length]` bool, True where a position counts; None where all do. What stands at the
            other positions has no influence, not even NaN.
    """
    loss: Tensor = _MeanSquare.apply(output, target, mask)  # type: ignore[no-untyped-call]
    return loss


class _MeanSquare(torch.autograd.Function):
    """Few passes over memory: the difference is formed once, in float32, and serves both directions."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        difference = output.to(torch.float32, copy=True).sub_(target)
        count = torch.full((), difference.numel(), device=output.device)
        if mask is not None:
            # Filled rather than multiplied: what stands at padding may be NaN, and 0 * NaN is NaN.
            difference.masked_fill_(~mask.unsqueeze(-1), 0.0)
            count = mask.sum().clamp_min(1) * difference.shape[-1]
        ctx.save_for_backward(difference, count)
        ctx.dtype = output.dtype
        flat = difference.reshape(-1)
        return torch.dot(flat, flat) / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        difference, count = ctx.saved_tensors
        return (difference * (grad * (2.0 / count))).to(ctx.dtype), None, None
