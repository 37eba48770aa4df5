"""Large channels of inputs made smaller, and the weights that read them larger, before rounding.

A linear layer reads `x` and multiplies it by `W`. With any factor `s` of a channel, `(x / s)` times `(W s)`
is the same product. Where inputs are rounded, a channel that is much larger than its neighbours spoils the
grid of its whole group: such channels get `s > 1`, and their columns of `W` carry what they lose. Where only
weights are rounded, an error in a column counts as much as the channel that it is multiplied by: columns of
large channels are made larger, so that the step of their group is finer beside them. The division costs
nothing when the model runs: it is put into whatever makes the channel, the weight of a norm or the rows of an
earlier matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 16.0
"""Largest factor of a channel; its inverse is the smallest."""
TINY = 1e-12
"""Mean squares up to this are those of channels that are always 0."""


@dataclass(frozen=True, slots=True)
class Rescaling:
    """What becomes of one tensor.

    Attributes:
        divided: divisors along its first axis, `[n] float32`; None for none.
        multiplied: factors along its last axis, `[n] float32`; None for none.
        plus: what the model adds to a norm's weight before it multiplies by it: the sum is divided.
    """

    divided: Tensor | None = None
    multiplied: Tensor | None = None
    plus: float = 0.0

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor rescaled, computed in float32 and rounded to its own dtype."""
        found = tensor.float()
        if self.multiplied is not None:
            found = found * self.multiplied.to(found.device)
        if self.divided is not None:
            by = self.divided.to(found.device).reshape(-1, *[1] * (found.dim() - 1))
            found = (found + self.plus) / by - self.plus
        return found.to(tensor.dtype)

    def also(self, other: Rescaling) -> Rescaling:
        """Both, of which one divides and one multiplies."""
        return Rescaling(
            self.divided if other.divided is None else other.divided,
            self.multiplied if other.multiplied is None else other.multiplied,
            self.plus or other.plus,
        )


def channel_factors(inputs: Tensor, weights: Tensor | None, strength: float) -> Tensor:
    """Factor of each channel, with geometric mean 1 over those that are not always 0.

    Where inputs are rounded it is `a ** strength / w ** (1 - strength)`, SmoothQuant's (arXiv 2211.10438,
    equation 4), where `a` and `w` are the largest magnitudes of a channel and of its column. Here they are
    root mean squares: with maxima more is lost (docs/LOG.md). Where only weights are rounded it is
    `a ** strength`, AWQ's (arXiv 2306.00978, equation 5): weights that read large channels become larger,
    so the step of their group is finer beside them. Channels that are always 0 (neurons that no row wakes,
    columns that only pad a matrix) stay as they are and have no say in the mean: as tiny ones they would push
    all others against `LARGEST`.

    Args:
        inputs: mean squares of the channels, `[n] float32`, best with every token scaled to the same size.
        weights: mean squares of the columns, `[n] float32`; None where only weights are rounded.
        strength: 1 makes all channels equally large; 0 all columns, or leaves all as they are.
    """
    logs, awake = 0.5 * strength * inputs.clamp_min(TINY).log(), inputs > TINY
    if weights is not None:
        logs -= 0.5 * (1 - strength) * weights.clamp_min(TINY).log()
        awake = awake & (weights > TINY)
    logs = torch.where(awake, logs - logs[awake].mean(), 0.0)
    return logs.exp().clamp(1 / LARGEST, LARGEST)


def held_factors(factors: Tensor, weight: Tensor, dtype: torch.dtype, plus: float) -> Tensor:
    """Factors by which the weight of a norm really falls when it is rounded to its dtype afterwards.

    Whoever reads the channel is multiplied by just that, so nothing is lost. It matters most where a model
    adds 1: a sum of 1 divided by 4 is stored as -0.75, whose steps in bfloat16 are coarse beside 0.25.

    Args:
        factors: wanted divisors, `[n] float32`.
        weight: of the norm, `[n]`.
        dtype: in which the quotient is stored.
        plus: what the model adds to it.

    Returns:
        `[n] float32`; 1 where the stored sum would vanish, or where it is 0.
    """
    whole = weight.float() + plus
    stored = Rescaling(divided=factors, plus=plus).of(weight.float()).to(dtype).float() + plus
    real = whole / stored
    return torch.where(real.isfinite() & (real > 0), real, 1.0)
