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
from auto_round.models.expert_products import FixedMatrices
from auto_round.models.matrix_experts import matrix_experts
from auto_round.numerics.compiled_rounding import CompiledRounding, compiled_rounding
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import Knobs, Scale, Stats
from auto_round.tuning.weights import Learned, Weight
from auto_round.tuning.workspace import Workspace

GROUPS = 1 << 17
"""Groups of weights whose ranges are differentiated at a time: half a MiB for each number of a group."""


@dataclass(slots=True)
class CodedStack(FixedMatrices):
    """The matrices of a stack as they come back from codes.

    Attributes:
        codes: of all of them.
        held: dtype to which they are rounded before they are cast; None for none.
    """

    codes: QTensor
    held: torch.dtype | None = None

    @property
    def height(self) -> int:
        """Rows of each."""
        return self.codes.shape[-2]

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """One of them, `[out, in]`."""
        q = self.codes
        one = QTensor(q.codes[index], q.scale[index], q.format)
        return q.format.dequantize(one, self.held or dtype).to(dtype)


@dataclass(slots=True)
class LearnedStack:
    """A stack under tuning (a `models.expert_products.Matrices`).

    Attributes:
        weight: its offsets and ranges.
        anchor: gradients are asked for it, so that those of the matrices are found.
        workspace: where one matrix at a time is rounded and gets its gradient; stacks of a block share it.
    """

    weight: Weight
    anchor: Tensor
    workspace: Workspace = field(default_factory=Workspace)
    _scale: Scale | None = None
    _move: float | None = None
    _alone: bool = False
    _expected: int = 0
    _found: dict[int, Tensor] = field(default_factory=dict)
    _learned: set[int] = field(default_factory=set)
    _knobs: Knobs | None = None
    _slopes: dict[int, tuple[Tensor | None, ...]] = field(default_factory=dict)
    _room: dict[int, Tensor] = field(default_factory=dict)

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
        """One matrix, rounded, `[out, in]`; in the workspace where a program rounds it."""
        weight, rounding = self.weight, self._rounding(index)
        if rounding is not None and weight.dtype in (torch.float32, torch.bfloat16):
            made = self.workspace.tensor(weight.original.shape[1:], weight.dtype)
            rounding.write(made)
            return made.to(dtype)
        original, scale = weight.original[index], self._scales[index]
        return weight.format.rounded_in(original, scale, weight.v.detach()[index], weight.dtype).to(dtype)

    def multiply(self, index: int, x: Tensor, out: Tensor) -> bool:
        """Multiply few tokens by one matrix as its rows are rounded; False where that cannot be done."""
        rounding = self._rounding(index) if self.weight.dtype is torch.bfloat16 else None
        if rounding is None or not rounding.multiplies(x):
            return False
        rounding.multiply(x, out)
        return True

    def learn(self, index: int, grad: Tensor, x: Tensor, to_x: Tensor | None) -> bool:
        """Learn one matrix from the gradient of its only product; False where that cannot be done."""
        self._refuse_again(index)
        by_rows = self.weight.v.requires_grad and self.weight.dtype is torch.bfloat16
        if self._move is None or not (by_rows and self._at_once):
            return False
        rounding = self._rounding(index)
        if rounding is None or not rounding.multiplies(x):
            return False
        self._learned.add(index)
        steps, outside = self._wanted()
        found = rounding.learn(grad, x, to_x, steps=steps, outside=outside, move=self._move)
        self._keep_slopes(index, *found)
        return True

    def begin(self, move: float | None, *, alone: bool) -> None:
        """Begin a pass of a step.

        Args:
            move: how far signs move offsets; None where an optimizer wants gradients.
            alone: the pass is the only one of this step, so that each matrix can be learned as soon as its
                gradient is known. Else gradients are added first.
        """
        self._move, self._alone, self._expected = move, alone, 0

    def expect(self) -> None:
        """Count a product whose gradients will come."""
        self._expected += 1

    @property
    def _at_once(self) -> bool:
        """Whether each gradient of this step is used up when it comes."""
        return self._move is not None and self._alone and self._expected == 1

    def room(self, index: int, dtype: torch.dtype) -> Tensor | None:
        """The workspace for a gradient that is used up, or added to another one, when it comes."""
        used_up = self._at_once or index in self._found
        return self.workspace.tensor(self.weight.original.shape[1:], dtype) if used_up else None

    def reached(self, index: int, gradient: Tensor) -> None:
        """Learn one matrix, or add to its gradient, in the order in which passes come."""
        self._refuse_again(index)
        if self._move is not None and self._at_once:
            self._learned.add(index)
            self._learn(index, gradient, self._move)
        elif index in self._found:
            self._found[index] = self._found[index].to(torch.float32).add_(gradient)
        else:
            self._found[index] = gradient

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of offsets and of both range multipliers, from those of the rounded matrices.

        None where there is nothing more to learn.
        """
        found, self._found = self._found, {}
        to_v = torch.zeros_like(self.weight.v) if found and self._move is None else None
        for index in list(found):
            gradient = found.pop(index)
            if self._move is not None:
                self._learn(index, gradient, self._move)
            elif to_v is not None and (own := self._differentiated(index, gradient)) is not None:
                to_v[index] = own
        self._through_scales()
        knobs, self._knobs = self._knobs, None
        self._learned.clear()
        return (to_v, None, None) if knobs is None else (to_v, knobs.lo, knobs.hi)

    def _refuse_again(self, index: int) -> None:
        """A matrix that was learned in this step has moved: no more gradients are taken."""
        if index in self._learned:
            raise InternalError("a matrix of a stack was learned before all its gradients were known")

    def _learn(self, index: int, gradient: Tensor, move: float) -> None:
        """Move one matrix' offsets by the signs of their gradient; keeps that of its ranges.

        A program does it in one pass over the weights. It is the same as with the gradient of the offsets.
        """
        weight, rounding = self.weight, self._rounding(index)
        if rounding is None or not weight.v.requires_grad:
            to_v = self._differentiated(index, gradient)
            if to_v is not None:
                weight.v.detach()[index].add_(to_v.sign_(), alpha=-move)
            return
        gradient = gradient.to(weight.dtype)
        if gradient.dtype is not torch.bfloat16:
            gradient = gradient.to(torch.float32)
        steps, outside = self._wanted()
        found = rounding.slopes(gradient.contiguous(), steps=steps, outside=outside, move=move)
        self._keep_slopes(index, *found)

    def _rounding(self, index: int) -> CompiledRounding | None:
        """How the program rounds one matrix, in the ranges of this step; None where PyTorch has to do it."""
        weight, fmt = self.weight, self.weight.format
        v = weight.v.detach()[index]
        return compiled_rounding(fmt.grid, fmt.group, weight.original[index], v, self._scales[index])

    @property
    def _scales(self) -> Scale:
        """Scales of all matrices in this step."""
        if self._scale is None:
            raise InternalError("a stack is multiplied before it is rounded")
        return self._scale

    def _wanted(self) -> tuple[bool, bool]:
        """Whether gradients of steps are wanted, and of what lies outside of the grid."""
        ranges = self.weight.knobs.lo.requires_grad
        return ranges, ranges and not (self._scales.zero is None and self._scales.floor is None)

    def _keep_slopes(self, index: int, *found: Tensor | None) -> None:
        """Keep the gradients of one matrix' scale until the step is taken.

        They lie in memory that stays: small tensors of each step would come to lie where large ones had been
        freed, and leave holes that no other large one fits (50 MB for matrices of 8 MB).
        """
        if all(slope is None for slope in found):
            return
        for i, slope in enumerate(found):
            if slope is not None and i not in self._room:
                self._room[i] = slope.new_empty((len(self.weight.original), *slope.shape))
        self._slopes[index] = tuple(
            None if slope is None else self._room[i][index].copy_(slope) for i, slope in enumerate(found)
        )

    def _through_scales(self) -> None:
        """Gradients of the ranges from those of the scales, of some matrices at a time."""
        fmt, own, slopes = self.weight.format, self.weight.stats, self._slopes
        alike = fmt.bound is None or fmt.matrix(0).bound is fmt.bound  # no matrix has numbers of its own
        each = max(1, GROUPS // max(1, own.lo[0].numel())) if alike else 1
        indices = sorted(slopes)
        for start in range(0, len(indices), each):
            some = indices[start : start + each]
            at = torch.tensor(some, dtype=torch.int64, device=own.lo.device) if alike else some[0]
            part, stats = fmt if alike else fmt.matrix(some[0]), Stats(own.lo[at], own.hi[at])
            sides = (self.weight.knobs.lo, self.weight.knobs.hi)
            lo, hi = (side.detach()[at].requires_grad_(side.requires_grad) for side in sides)
            with torch.enable_grad():
                scale = part.rule_for(stats).fit(stats, part.grid, Knobs(lo, hi))
            to_step, outside = (
                torch.stack(known).reshape(scale.step.shape)
                if (known := [x for x in parts if x is not None])
                else None
                for parts in zip(*(slopes.pop(i) for i in some), strict=True)
            )
            to_zero = None if outside is None else outside * scale.step.detach()
            pairs = [
                (x, slope)
                for x, slope in ((scale.step, to_step), (scale.zero, to_zero), (scale.floor, outside))
                if x is not None and slope is not None and x.requires_grad
            ]
            if pairs:
                outputs, gradients = zip(*pairs, strict=True)
                asked = [x for x in (lo, hi) if x.requires_grad]
                inner = iter(torch.autograd.grad(outputs, asked, gradients, allow_unused=True))
                self._keep(at, *(next(inner) if x.requires_grad else None for x in (lo, hi)))

    def _parts(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets and both range multipliers of one matrix, in the memory of the stack."""
        weight = self.weight
        tensors = (weight.v, weight.knobs.lo, weight.knobs.hi)
        v, lo, hi = (x[index].detach().requires_grad_(x.requires_grad) for x in tensors)
        return v, lo, hi

    def _differentiated(self, index: int, gradient: Tensor) -> Tensor | None:
        """Gradient of one matrix' offsets, None where these stay; keeps those of its ranges."""
        v, lo, hi = self._parts(index)
        wanted = [x for x in (v, lo, hi) if x.requires_grad]
        if not wanted:
            return None
        with torch.enable_grad():
            rounded = self.weight.fake_matrix(index, Learned(Knobs(lo, hi), v))
        inner = iter(torch.autograd.grad(rounded, wanted, gradient.to(rounded.dtype), allow_unused=True))
        to_v, *ranges = (next(inner) if x.requires_grad else None for x in (v, lo, hi))
        self._keep(index, *ranges)
        return to_v

    def _keep(self, index: int | Tensor, to_lo: Tensor | None, to_hi: Tensor | None) -> None:
        """Keep the gradients of the ranges of some matrices until the step is taken."""
        if self._knobs is None:
            own = self.weight.knobs
            self._knobs = Knobs(torch.zeros_like(own.lo), torch.zeros_like(own.hi))
        for side, found in ((self._knobs.lo, to_lo), (self._knobs.hi, to_hi)):
            if found is not None:
                side[index] = found


def find_stacks(block: nn.Module, weights: Mapping[str, Weight]) -> dict[str, LearnedStack]:
    """Weights whose matrices a block multiplies by one at a time, on a processor."""
    workspace = Workspace()
    return {
        name: LearnedStack(
            weight,
            torch.zeros((), dtype=torch.float32, device=weight.v.device, requires_grad=True),
            workspace,
        )
        for name, weight in weights.items()
        if weight.v.device.type == "cpu" and matrix_experts(block, name) is not None
    }
