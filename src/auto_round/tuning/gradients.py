"""Gradients of one step: sums over the passes through a block, on however many ranks these are made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from auto_round.ranks.ranks import Ranks
from auto_round.ranks.tree import TreeSum, Values


class GradientSum:
    """What the passes of a step add up to.

    Args:
        ranks: who makes the passes.
        by_row: add in an order that depends on the passes' places only, not on who makes them.
        half: the block runs in float16, where gradients are scaled up on their way.
    """

    def __init__(self, ranks: Ranks, *, by_row: bool, half: bool) -> None:
        self._ranks, self._by_row, self._half = ranks, by_row, half
        self._divided = by_row or ranks.size > 1
        self._sum = TreeSum()
        self._scale: tuple[int, Tensor] | None = None

    def add(self, place: int, loss: Tensor, reached: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        """Differentiate one pass.

        Args:
            place: number of the pass in the step, counted over all ranks.
            loss: of this pass, a float32 scalar.
            reached: tensors to which it is differentiated, the same in each call.
            counts: elements that the loss is a mean of.
        """
        if not self._half:
            scale = None
        elif self._scale is None or self._divided:
            scale = _gradient_scale(loss, counts)
            self._scale = self._scale or (place, scale)
        else:
            scale = self._scale[1]
        # A weight that the batch did not reach (an expert without tokens) has no gradient.
        found: Sequence[Tensor | None] = torch.autograd.grad(loss, reached, scale, allow_unused=True)
        if self._divided and scale is not None:  # each pass has a scale of its own: no pass waits for another
            found = [None if g is None else g.float() / scale.to(g.device) for g in found]
        self._sum.add(place if self._by_row else self._ranks.rank, found)

    def total(self, count: int) -> tuple[Values, Tensor | None]:
        """The sum of all passes, and the factor that is still in it.

        Args:
            count: tensors to which passes were differentiated.
        """
        total = self._ranks.sum(self._sum) or [None] * count
        if not self._half:
            return total, None
        scales = [each for each in self._ranks.objects(self._scale) if each is not None]
        if not scales:
            return total, None
        _, scale = min(scales, key=lambda each: each[0])
        if self._divided:
            total = [None if g is None else g.mul_(scale.to(g.device)) for g in total]
        return total, scale


def _gradient_scale(loss: Tensor, counts: Sequence[Tensor]) -> Tensor:
    """Factor of the loss, and so of the gradients, while they pass through a block in float16.

    Positive numbers of float16 reach from 6e-8 to 65504, and gradients of a mean over millions of elements
    are smaller. With the factor they are about 1/64 at the block's output: sums over tokens still fit.
    """
    return reduce(torch.add, counts) * 2.0**-7 / loss.detach().sqrt().clamp_min(1e-9)
