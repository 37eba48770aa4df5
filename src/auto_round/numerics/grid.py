"""Grids: the finite set of numbers that one code can stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Grid(Protocol):
    """A finite set of numbers, each with a code of `bits` bits.

    Attributes:
        bits: width of a code.
        lo: smallest number of the grid.
        hi: largest number of the grid.
        end_steps: distance of the number farthest from the middle, in units of the spacing there.
    """

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    @property
    def lo(self) -> float:
        """Smallest number."""
        ...

    @property
    def hi(self) -> float:
        """Largest number."""
        ...

    @property
    def end_steps(self) -> float:
        """Distance of the farthest number from the middle, divided by the spacing at that end."""
        ...

    def spacing(self, u: Tensor) -> Tensor | None:
        """Distance between the numbers on both sides of `u`, same shape; None where it is 1 everywhere."""
        ...

    def saturated(self, u: Tensor) -> Tensor:
        """Whether `u` lies so far outside that another number would be nearer if the grid went on; bool."""
        ...

    def snap(self, u: Tensor, shift: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Nearest grid number of `u`, plus `shift` (a whole number), saturated; float32, same shape.

        With `out` the result is put there; it may be `u`.
        """
        ...

    def encode(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """`uint8` code of each number of the grid; with `out` the codes are put there."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Grid number of each code, float32, exact."""
        ...


@dataclass(frozen=True, slots=True)
class IntGrid:
    """Whole numbers `lo ... lo + 2**bits - 1`; the code of `n` is `n - lo`.

    Symmetric formats use `lo = -2**(bits-1)`, asymmetric ones `lo = 0` with a zero point.
    """

    bits: int
    lo: int

    @property
    def hi(self) -> int:
        """Largest number of the grid."""
        return self.lo + (1 << self.bits) - 1

    @property
    def end_steps(self) -> float:
        """`2**(bits-1)`: the middle is 0 for signed numbers, the usual zero point for the others."""
        return float(1 << (self.bits - 1))

    def spacing(self, u: Tensor) -> None:
        """1 everywhere."""
        return

    def saturated(self, u: Tensor) -> Tensor:
        """Half a unit beyond the ends still rounds to the ends, so it has not saturated."""
        return (u < self.lo - 0.5) | (u > self.hi + 0.5)

    def snap(self, u: Tensor, shift: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Round to nearest, ties to even, then add `shift`, then saturate.

        The shift is added after rounding: GPTQ-style files assume `round(w / s) + zero`, and adding it
        before would move ties.
        """
        n = torch.round(u, out=out)
        if shift is not None:
            n = n.add_(shift)
        return n.clamp_(self.lo, self.hi)

    def encode(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """`uint8` codes `n - lo`; with `out` they are put there."""
        codes = torch.empty_like(numbers, dtype=torch.uint8) if out is None else out
        # By way of signed bytes: on CPUs conversion to unsigned ones is five times slower. What is added
        # afterwards, modulo 256, brings every number to its code.
        middle = 128 if self.hi > 127 else 0
        codes.view(torch.int8).copy_(numbers - middle if middle else numbers)
        return codes.add_(middle - self.lo)

    def decode(self, codes: Tensor) -> Tensor:
        """Numbers of the codes, float32."""
        return codes.to(torch.float32) + self.lo
