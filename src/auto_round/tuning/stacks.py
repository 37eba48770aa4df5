"""Stacks of matrices under tuning, as of experts: rounded, multiplied and learned one matrix at a time.

Of such a weight a step holds its codes and one gradient, 5 bytes a weight beside the weight and its offsets.
The rounded weights, what their rounding keeps for the backward pass and the gradients of offsets, 17 bytes a
weight, exist for the matrix at hand only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from auto_round.errors import InternalError
from auto_round.models.matrix_experts import matrix_experts
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import Knobs
from auto_round.tuning.weights import Learned, Weight


@dataclass(slots=True)
class CodedStack:
    """The matrices of a stack as they come back from codes (`models.matrix_experts.Matrices`).

    Attributes:
        codes: of all of them.
        held: dtype to which they are rounded before they are cast; None for none.
    """

    codes: QTensor
    held: torch.dtype | None = None
    anchor: Tensor | None = None

    @property
    def height(self) -> int:
        """Rows of each."""
        return self.codes.shape[-2]

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """One of them, `[out, in]`."""
        q = self.codes
        one = QTensor(q.codes[index], q.scale[index], q.format)
        return q.format.dequantize(one, self.held or dtype).to(dtype)

    def reached(self, index: int, gradient: Tensor) -> None:
        """Nothing is learned of it."""


@dataclass(slots=True)
class LearnedStack:
    """A stack under tuning (`models.matrix_experts.Matrices`).

    Attributes:
        weight: its offsets and ranges.
        anchor: gradients are asked for it, so that those of the matrices are found.
    """

    weight: Weight
    anchor: Tensor
    _now: CodedStack | None = None
    _gradient: Tensor | None = None
    _reached: set[int] = field(default_factory=set)

    @property
    def height(self) -> int:
        """Rows of each matrix."""
        return int(self.weight.original.shape[-2])

    def round(self) -> LearnedStack:
        """Round all matrices with the offsets and ranges as they are now."""
        self._now = None  # its memory is free for what comes
        self._now = CodedStack(self.weight.quantize())
        return self

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """One matrix as it was rounded last, `[out, in]`."""
        if self._now is None:
            raise InternalError("a stack is multiplied before it is rounded")
        return self._now.matrix(index, self.weight.dtype).to(dtype)

    def reached(self, index: int, gradient: Tensor) -> None:
        """Add a pass' gradient of one rounded matrix, in the order in which passes come."""
        if self._gradient is None:
            self._gradient = torch.empty_like(self.weight.original, dtype=torch.float32)
        if index in self._reached:
            self._gradient[index].add_(gradient)
        else:
            self._gradient[index].copy_(gradient)
            self._reached.add(index)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of offsets and of both range multipliers, from those of the rounded matrices.

        Each matrix is rounded once more, and its gradient makes way for that of its offsets. None where no
        matrix was reached.
        """
        found, self._gradient = self._gradient, None
        reached, self._reached = self._reached, set()
        if found is None:
            return None, None, None
        weight = self.weight
        knobs = Knobs(*(torch.zeros_like(side) for side in (weight.knobs.lo, weight.knobs.hi)))
        for i in range(len(found)):
            if i not in reached:
                found[i].zero_()
                continue
            learned = [
                x[i].detach().requires_grad_(x.requires_grad)
                for x in (weight.v, weight.knobs.lo, weight.knobs.hi)
            ]
            with torch.enable_grad():
                v, lo, hi = learned
                rounded = weight.fake_matrix(i, Learned(Knobs(lo, hi), v))
            wanted = [x for x in learned if x.requires_grad]
            inner = iter(torch.autograd.grad(rounded, wanted, found[i].to(rounded.dtype), allow_unused=True))
            for x, to in zip(learned, (found[i], knobs.lo[i], knobs.hi[i]), strict=True):
                gradient = next(inner) if x.requires_grad else None
                if gradient is not None:
                    to.copy_(gradient)
        return found, knobs.lo, knobs.hi


def find_stacks(block: nn.Module, weights: Mapping[str, Weight]) -> dict[str, LearnedStack]:
    """Weights whose matrices a block multiplies by one at a time, on a processor."""
    return {
        name: LearnedStack(
            weight, torch.zeros((), dtype=torch.float32, device=weight.v.device, requires_grad=True)
        )
        for name, weight in weights.items()
        if weight.v.device.type == "cpu" and matrix_experts(block, name) is not None
    }
