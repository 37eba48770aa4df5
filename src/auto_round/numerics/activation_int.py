"""Whole-number activations with one step for the whole tensor that calibration fixes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.activation_float import CalibratedScale, FixedScale
from auto_round.numerics.format import Format
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.group import Group
from auto_round.numerics.scale import legal_step
from auto_round.numerics.scale_float import LargestToTop

ZERO_DTYPE = torch.int8
"""Dtype of a stored zero point. Source: compressed-tensors 0.20, `initialize_qparams`."""


@dataclass(frozen=True, slots=True)
class CalibratedInt(CalibratedScale):
    """Whole numbers of one step for the whole tensor, which calibration has not fixed yet.

    Symmetric: `step = max(-least, largest) / grid.hi`. Asymmetric: `step = (largest - least) / (2**bits - 1)`
    and `zero = round(grid.lo - least / step)`, for `least <= 0 <= largest`.

    Attributes:
        format: signed whole numbers, one group for the whole tensor.
        sym: without zero point.
    """

    sym: bool = True

    @property
    def has_zero(self) -> bool:
        """Calibration fixes a zero point too."""
        return not self.sym

    def fixed(self, largest: float, least: float | None = None) -> FixedInt:
        """The format for inputs from `least` (None: `-largest`) to `largest`."""
        lo, hi = min(0.0, -largest if least is None else least), max(0.0, largest)
        grid = self.format.grid
        size = max(-lo, hi) / grid.hi if self.sym else (hi - lo) / (grid.hi - grid.lo)
        step = legal_step(torch.tensor([size], dtype=torch.float32, device="cpu"), self.dtype)
        if self.sym:
            return self.holding(step.to(self.dtype))
        zero = torch.round(grid.lo - lo / step).clamp(grid.lo, grid.hi)
        return self.holding(step.to(self.dtype), zero.to(ZERO_DTYPE))

    def holding(self, number: Tensor, zero: Tensor | None = None) -> FixedInt:
        """The format with step and zero point as they are stored, one element each."""
        return FixedInt(self.format, number.reshape(1), None if zero is None else zero.reshape(1))


@dataclass(frozen=True, slots=True, eq=False)
class FixedInt(FixedScale):
    """Whole numbers of a known step and zero point: `y = step * (clamp(x / step + zero) - zero)`, rounded.

    All arithmetic is done in the dtype of the activations, as compressed-tensors 0.20 does when it runs a
    folder (`_quantize_dequantize` in `quantization/lifecycle/forward_helpers.py`): these numbers equal its
    numbers bit for bit. vLLM's kernel divides in float32.

    Attributes:
        format: see `CalibratedInt`.
        number: the step as it is stored, `[1]`.
        zero: the zero point as it is stored, `[1]` int8; None where numbers are symmetric.
    """

    zero: Tensor | None = None

    def round(self, x: Tensor) -> Tensor:
        """What `fake_quantize` gives, without a gradient."""
        grid = self.format.grid
        with torch.no_grad():
            step = self.number.to(x.device, x.dtype)
            u = x / step
            if self.zero is None:
                return u.clamp_(grid.lo, grid.hi).round_().mul_(step).to(x.dtype)
            zero = self.zero.to(x.device, u.dtype)
            return u.add_(zero).clamp_(grid.lo, grid.hi).round_().sub_(zero).mul_(step).to(x.dtype)


def tensor_int(bits: int, *, sym: bool) -> CalibratedInt:
    """Whole-number inputs of `bits` bits with one step for the whole tensor that calibration fixes."""
    name = f"int{bits}_tensor_{'sym' if sym else 'asym'}"
    grid = IntGrid(bits, -(1 << (bits - 1)))
    return CalibratedInt(Format(name, grid, Group(0), LargestToTop(torch.float32)), sym)
