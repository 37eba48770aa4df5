"""Loss of a block: mean squared difference to the unquantized block's output."""

from __future__ import annotations

from torch import Tensor


def block_loss(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the counted elements of the squared difference, float32 scalar.

    Args:
        output: `[batch, length, hidden]`.
        target: same shape.
        mask: `[batch, length]` bool, True where a position counts; None where all do.
    """
    difference = output.float() - target.float()
    if mask is None:
        return difference.square().mean()
    weight = mask.unsqueeze(-1).to(difference.dtype)
    counted = weight.sum() * difference.shape[-1]
    return (difference.square() * weight).sum() / counted.clamp_min(1)
