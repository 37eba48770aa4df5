"""Stacks of matrices under tuning, as of experts: rounded, multiplied and learned one matrix at a time.

Beside the weight and its offsets a step holds nothing of the whole stack: rounded weights and all gradients
exist for the matrix at hand only, and what no token reached is not touched. Only where gradients of several
passes have to be added, or where an optimizer wants all of them, are they kept until the step is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from auto_round.errors import InternalError
from auto_round.models.matrix_experts import matrix_experts
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import Knobs, Scale
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

    def expect(self) -> None:
        """Nothing is learned."""

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
    _scale: Scale | None = None
    _move: float | None = None
    _expected: int = 0
    _found: dict[int, Tensor] = field(default_factory=dict)
    _learned: set[int] = field(default_factory=set)
    _knobs: Knobs | None = None

    @property
    def height(self) -> int:
        """Rows of each matrix."""
        return int(self.weight.original.shape[-2])

    def round(self) -> LearnedStack:
        """Let all matrices be rounded in the ranges as they are now."""
        weight = self.weight
        with torch.no_grad():
            self._scale = weight.format.rule_for(weight.stats).fit(
                weight.stats, weight.format.grid, weight.knobs
            )
        return self

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """One matrix, rounded, `[out, in]`."""
        if self._scale is None:
            raise InternalError("a stack is multiplied before it is rounded")
        weight = self.weight
        with torch.no_grad():
            made = weight.format.rounded(weight.original[index], self._scale[index], weight.v[index])
            return made.to(weight.dtype).to(dtype)

    def begin(self, move: float | None) -> None:
        """Begin a step.

        Args:
            move: how far signs move offsets, if the next pass is the only one of this step: each matrix is
                then learned as soon as its gradient is known. None where gradients are added first.
        """
        self._move, self._expected = move, 0

    def expect(self) -> None:
        """Count a product whose gradients will come."""
        self._expected += 1

    def reached(self, index: int, gradient: Tensor) -> None:
        """Learn one matrix, or add to its gradient, in the order in which passes come."""
        if index in self._learned:
            raise InternalError("a matrix of a stack was learned before all its gradients were known")
        if self._move is not None and self._expected == 1:
            self._learned.add(index)
            to_v = self._differentiated(index, gradient)
            if to_v is not None:
                with torch.no_grad():
                    self.weight.v[index].add_(to_v.sign_(), alpha=-self._move)
        elif index in self._found:
            self._found[index] = self._found[index].to(torch.float32).add_(gradient)
        else:
            self._found[index] = gradient

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of offsets and of both range multipliers, from those of the rounded matrices.

        None where there is nothing more to learn.
        """
        found, self._found = self._found, {}
        to_v = torch.zeros_like(self.weight.v) if found else None
        for index in list(found):
            gradient = self._differentiated(index, found.pop(index))
            if to_v is not None and gradient is not None:
                to_v[index] = gradient
        knobs, self._knobs = self._knobs, None
        self._learned.clear()
        return (to_v, None, None) if knobs is None else (to_v, knobs.lo, knobs.hi)

    def _differentiated(self, index: int, gradient: Tensor) -> Tensor | None:
        """Gradient of one matrix' offsets, None where these stay; keeps those of its ranges."""
        weight = self.weight
        tensors = (weight.v, weight.knobs.lo, weight.knobs.hi)
        if not any(x.requires_grad for x in tensors):
            return None
        v, lo, hi = (x[index].detach().requires_grad_(x.requires_grad) for x in tensors)
        with torch.enable_grad():
            rounded = weight.fake_matrix(index, Learned(Knobs(lo, hi), v))
        wanted = [x for x in (v, lo, hi) if x.requires_grad]
        inner = iter(torch.autograd.grad(rounded, wanted, gradient.to(rounded.dtype), allow_unused=True))
        to_v, to_lo, to_hi = (next(inner) if x.requires_grad else None for x in (v, lo, hi))
        if self._knobs is None:
            self._knobs = Knobs(*(torch.zeros_like(side) for side in tensors[1:]))
        for side, found in ((self._knobs.lo, to_lo), (self._knobs.hi, to_hi)):
            if found is not None:
                side[index] = found
        return to_v


def find_stacks(block: nn.Module, weights: Mapping[str, Weight]) -> dict[str, LearnedStack]:
    """Weights whose matrices a block multiplies by one at a time, on a processor."""
    return {
        name: LearnedStack(
            weight, torch.zeros((), dtype=torch.float32, device=weight.v.device, requires_grad=True)
        )
        for name, weight in weights.items()
        if weight.v.device.type == "cpu" and matrix_experts(block, name) is not None
    }
