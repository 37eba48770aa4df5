"""Floating grids: sign, exponent and mantissa in 4 to 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from auto_round.errors import InternalError

_EXPONENT = 0x7F800000
"""Bits of the exponent in a float32 (IEEE 754, binary32)."""
_HALF_EXPONENT, _HALF_MANTISSA = 5, 10
_HALF_SMALLEST_NORMAL = 2.0**-14
"""Those of a float16 (IEEE 754, binary16)."""


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """Numbers `+-(1 + mantissa / 2**M) * 2**(exponent - bias)`, with a bias of `2**(E-1) - 1`.

    Below the least exponent, numbers are multiples of the spacing there (subnormal numbers). A code is sign,
    exponent and mantissa.

    Codes beyond `top` stand for infinity or for no number; they are never written, and read as what they
    would be if the format went on.

    Attributes:
        exponent_bits: E.
        mantissa_bits: M, without the leading one.
        top: largest number.
    """

    exponent_bits: int
    mantissa_bits: int
    top: float

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def lo(self) -> float:
        """Smallest number."""
        return -self.top

    @property
    def hi(self) -> float:
        """Largest number."""
        return self.top

    @property
    def smallest_normal(self) -> float:
        """Smallest number with a leading one."""
        return math.ldexp(1.0, 2 - (1 << (self.exponent_bits - 1)))

    @property
    def smallest(self) -> float:
        """Smallest positive number."""
        return self.smallest_normal * 2.0**-self.mantissa_bits

    def spacing(self, u: Tensor) -> Tensor:
        """Distance of the grid's numbers around `u`: `2**(floor(log2|u|) - M)`, float32.

        Below the smallest normal number it is the same as there, beyond the ends the same as at the ends.
        """
        # A float32 without its mantissa is 2**floor(log2|u|), exactly.
        power = (u.to(torch.float32).contiguous().view(torch.int32) & _EXPONENT).view(torch.float32)
        least, most = self.smallest_normal, 2.0 ** _exponent_of(self.top)
        return power.clamp_(least, most).mul_(2.0**-self.mantissa_bits)

    @property
    def end_steps(self) -> float:
        """The largest number, in units of the spacing there."""
        return self.top / (2.0 ** (_exponent_of(self.top) - self.mantissa_bits))

    def saturated(self, u: Tensor) -> Tensor:
        """Half a spacing beyond the ends still rounds to the ends, so it has not saturated."""
        return u.abs() > self.top + 2.0 ** (_exponent_of(self.top) - self.mantissa_bits - 1)

    def snap(self, u: Tensor, shift: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Round to nearest, ties to the even mantissa, then saturate.

        Raises:
            InternalError: a shift is given: floating grids have no zero point.
        """
        if shift is not None:
            raise InternalError("a floating grid has no zero point")
        spacing = self.spacing(u)
        # Dividing and multiplying by a power of two is exact.
        return torch.div(u, spacing, out=out).round_().mul_(spacing).clamp_(self.lo, self.hi)

    def encode(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """`uint8` code of each number; a zero keeps its sign, as in every format of this kind."""
        magnitudes = _magnitudes(self, numbers.device)
        codes = torch.bucketize(numbers.abs().contiguous(), magnitudes, out_int32=True)
        codes += torch.signbit(numbers).to(torch.int32) << (self.bits - 1)
        if out is None:
            return codes.to(torch.uint8)
        return out.copy_(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Numbers of the codes, float32."""
        if self.exponent_bits >= _HALF_EXPONENT:  # their largest codes are no numbers in float16
            numbers = torch.index_select(_numbers(self, codes.device), 0, codes.reshape(-1).to(torch.int32))
            return numbers.reshape(codes.shape)
        # Moved to where a float16 has sign, exponent and mantissa: several times as fast as a table on CPUs.
        codes = codes.to(torch.uint8)  # other integers would be cut into bytes
        signed = (codes if self.bits == 8 else codes << (8 - self.bits)).view(torch.int8)
        wide = signed.to(torch.int16).bitwise_left_shift_(3 + self.exponent_bits)
        copies_of_the_sign = ((1 << _HALF_EXPONENT) - (1 << self.exponent_bits)) << _HALF_MANTISSA
        half = wide.bitwise_and_(~copies_of_the_sign).view(torch.float16)
        return half.to(torch.float32).mul_(self.smallest_normal / _HALF_SMALLEST_NORMAL)


@cache
def _magnitudes(grid: FloatGrid, device: torch.device) -> Tensor:
    """Number of each code without its sign, ascending, `[2**(bits - 1)]` float32."""
    codes = torch.arange(1 << (grid.bits - 1), dtype=torch.int32, device="cpu")
    mantissa = codes & ((1 << grid.mantissa_bits) - 1)
    exponent = codes >> grid.mantissa_bits
    normal = (exponent > 0).to(torch.int32)
    fraction = (mantissa + (normal << grid.mantissa_bits)).to(torch.float32) * 2.0**-grid.mantissa_bits
    first = _exponent_of(grid.smallest_normal)
    return torch.ldexp(fraction, first + (exponent - normal)).to(device)


@cache
def _numbers(grid: FloatGrid, device: torch.device) -> Tensor:
    """Number of each code, `[2**bits]` float32."""
    magnitudes = _magnitudes(grid, device)
    return torch.cat([magnitudes, -magnitudes])


def _exponent_of(x: float) -> int:
    """`floor(log2(x))` of a positive number, exactly."""
    return math.frexp(x)[1] - 1


E2M1 = FloatGrid(2, 1, 6.0)
E2M3 = FloatGrid(2, 3, 7.5)
E3M2 = FloatGrid(3, 2, 28.0)
E4M3 = FloatGrid(4, 3, 448.0)
E5M2 = FloatGrid(5, 2, 57344.0)
"""FP4, both kinds of FP6 and both of FP8. Source: OCP Microscaling Formats (MX) 1.0, section 5.3; E4M3 has
no infinity and one code for no number (`float8_e4m3fn` in PyTorch), E5M2 has both (IEEE 754)."""

E5M3 = FloatGrid(5, 3, 114688.0)
"""Scales of NVFP4's variant with a wider range; their codes without a sign fill a byte."""

FLOAT_GRIDS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3, "e5m2": E5M2}
"""Floating grids by name."""
