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
    left_out = ~mask.unsqueeze(-1)
    counted = mask.sum() * difference.shape[-1]
    # Filled rather than multiplied: what stands at padding may be NaN, and 0 * NaN is NaN.
    return difference.masked_fill(left_out, 0.0).square().sum() / counted.clamp_min(1)
