"""Powers of two as steps: E8M0 bytes of the microscaling (MX) formats.

Source: OCP Microscaling Formats (MX) 1.0, sections 5.4.1 (E8M0) and 6.3 (conversion).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid
from auto_round.numerics.scale import MAX_KNOB, Knobs, Moments, PartSpec, Scale, Stats
from auto_round.numerics.scale_float import larger_side
from auto_round.numerics.search_groups import GroupRule
from auto_round.numerics.ste import replace_ste

BIAS = 127
"""The byte of `2**0`."""
NOT_A_NUMBER = 255
"""The byte that stands for NaN."""
LEAST = -126
"""Least exponent of a step. `2**-127` could be read too, but it is subnormal in float32, where processors may
flush it to 0."""


@dataclass(frozen=True, slots=True)
class PowerOfTwo(GroupRule):
    """Step `2**E` with the least whole `E` under which the larger extreme is at most `most` steps.

    Which extremes get the next power is where published rules differ, see `floor_rule`, `below_rule` and
    `ceil_rule`.

    Attributes:
        most: largest extreme in steps.
        fraction: bits behind the point of a whole-number grid: its number `n` stands for `n / 2**fraction`
            in units of the stored power. 0 for floating grids.
    """

    most: float
    fraction: int = 0

    @property
    def stored(self) -> Mapping[str, PartSpec]:
        """The biased exponent, an E8M0 byte."""
        return {"exponent": PartSpec(torch.uint8, 8)}

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """Step of each group; its gradient is that of a step in proportion to the extreme.

        `d step / d extreme = step / extreme`: on average over many groups that is how the powers grow.
        """
        size = larger_side(stats, knobs)
        most = 128 - math.frexp(max(grid.hi, -grid.lo))[1]  # so that all weights are finite
        exponent = self._exponent(size.detach()).clamp_(LEAST, most)
        if not size.requires_grad:
            return self.read({"exponent": (exponent + (BIAS + self.fraction)).to(torch.uint8)})
        step = torch.ldexp(torch.ones_like(size), exponent)
        return Scale(replace_ste(size, step, step / size.detach().clamp_min(1e-30)), None)

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Step of each byte; NaN for `NOT_A_NUMBER`."""
        octet = parts["exponent"].to(torch.int32)
        one = torch.ones(octet.shape, dtype=torch.float32, device=octet.device)
        step = torch.ldexp(one, octet - (BIAS + self.fraction))
        return Scale(step.masked_fill(octet == NOT_A_NUMBER, torch.nan), None, parts)

    def _exponent(self, size: Tensor) -> Tensor:
        """Least whole `E` with `size <= most * 2**E`, exactly; `LEAST` for 0."""
        mantissa, exponent = torch.frexp(size.clamp_max(torch.finfo(torch.float32).max))
        head, tail = math.frexp(self.most)
        return torch.where(size > 0, exponent - tail + (mantissa > head), LEAST)

    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """A power less and one or two more than the rule's own."""
        for factor in (0.5, 2.0, 4.0):
            knob = torch.full_like(stats.lo, factor)
            yield Knobs(knob, knob)

    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """The neighbouring powers, whatever the radius."""
        for factor in (0.5, 2.0):
            yield Knobs((knobs.lo * factor).clamp_max(MAX_KNOB), (knobs.hi * factor).clamp_max(MAX_KNOB))

    def refit(self, stats: Stats, grid: Grid, scale: Scale, moments: Moments) -> Knobs | None:
        """None: neighbouring powers are tried anyway."""
        return None


def floor_rule(grid: Grid, fraction: int = 0) -> PowerOfTwo:
    """`E = floor(log2(extreme)) - floor(log2(grid.hi))`: extremes of more than `grid.hi` steps saturate.

    Source: MX 1.0, section 6.3.
    """
    return below_rule(2.0 ** math.frexp(grid.hi)[1], fraction)


def below_rule(limit: float, fraction: int = 0) -> PowerOfTwo:
    """The next power from an extreme of `limit` steps on."""
    return PowerOfTwo(_below(limit), fraction)


def ceil_rule(grid: Grid, fraction: int = 0) -> PowerOfTwo:
    """`E = ceil(log2(extreme / grid.hi))`: nothing saturates (`RCEIL` in the names of schemes)."""
    return PowerOfTwo(grid.hi, fraction)


def _below(x: float) -> float:
    """The float32 before a positive one."""
    return float(
        torch.nextafter(
            torch.tensor(x, dtype=torch.float32, device="cpu"),
            torch.zeros((), dtype=torch.float32, device="cpu"),
        )
    )
