"""Scales of floating grids: one float a group, or an FP8 number a group over a float for the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.scale import MAX_KNOB, Knobs, Moments, PartSpec, Scale, Stats, legal_step
from auto_round.numerics.scale_integer import even_starts
from auto_round.numerics.search_groups import GroupRule
from auto_round.numerics.ste import replace_ste


def larger_side(stats: Stats, knobs: Knobs | None) -> Tensor:
    """Magnitude of the larger extreme of each group, times its multiplier."""
    if knobs is None:
        return torch.maximum(-stats.lo, stats.hi)
    return torch.maximum(-stats.lo * knobs.lo, stats.hi * knobs.hi)


def size_knobs(stats: Stats, size: Tensor) -> Knobs:
    """Knobs, both alike, under which `larger_side` is `size`, as far as 16 times the measured one."""
    knob = (size / larger_side(stats, None).clamp_min(1e-30)).clamp(0, MAX_KNOB)
    return Knobs(knob, knob)


class BySize(GroupRule):
    """A rule that looks at the magnitude of a group's larger extreme only."""

    __slots__ = ()

    def starts(self, stats: Stats, grid: Grid, points: int) -> Iterator[Knobs]:
        """Sizes of the range: an extreme may saturate, or lie at the number before the largest."""
        yield from even_starts(stats, 0.5, 1.6, points)

    def moves(self, knobs: Knobs, radius: float) -> Iterator[Knobs]:
        """A little wider, a little narrower."""
        for factor in (1 - radius, 1 + radius):
            yield Knobs(knobs.lo * factor, knobs.hi * factor)

    def refit(self, stats: Stats, grid: Grid, scale: Scale, moments: Moments) -> Knobs | None:
        """Least-squares step `sum(i w n) / sum(i n n)`."""
        return size_knobs(stats, moments.nw / moments.nn.clamp_min(1e-30) * grid.hi)


@dataclass(frozen=True, slots=True)
class LargestToTop(BySize):
    """The larger extreme is mapped to the grid's largest number: `step = cast(extreme / grid.hi)`.

    Source: compressed-tensors 0.20, `calculate_qparams` in `quantization/utils/helpers.py` for 8-bit floats.

    Attributes:
        dtype: stored dtype of the step.
    """

    dtype: torch.dtype = torch.float32

    @property
    def stored(self) -> Mapping[str, PartSpec]:
        """The step."""
        return {"step": PartSpec(self.dtype, torch.finfo(self.dtype).bits)}

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """The step of each group."""
        step = legal_step(larger_side(stats, knobs) / grid.hi, self.dtype)
        if step.requires_grad:
            return Scale(step, None)
        return self.read({"step": step.to(self.dtype)})

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Step as stored."""
        return Scale(parts["step"].to(torch.float32), None, parts)


@dataclass(frozen=True, slots=True)
class OverTensor:
    """NVFP4: the step of a group is a small float `b`, divided by a number `t` that all groups share.

    `t = grid.hi * top / largest`, so that the group with the largest weight of all gets `b = top`, and for
    each group `b` is the number of the grid `blocks` nearest to `extreme / grid.hi * t`.

    Source: compressed-tensors 0.20, `calculate_qparams` and `generate_gparam` in
    `quantization/utils/helpers.py`; `t` is what it stores as `weight_global_scale`.

    Attributes:
        blocks: grid of the groups' numbers, of which the positive ones are used: codes of a byte.
        top: what the largest group gets.
        least: what a group gets whose number would be 0.
        times: the step is `b * t` with `t = largest / (grid.hi * top)` instead, as in GGUF files.
    """

    blocks: FloatGrid
    top: float
    least: float
    times: bool = False

    @property
    def stored(self) -> Mapping[str, PartSpec]:
        """The code of each group's number, and the shared number."""
        return {"block": PartSpec(torch.uint8, 8), "tensor": PartSpec(torch.float32, 32, (0, 0))}

    @property
    def tunable(self) -> bool:
        """The shared number stays, so knobs move the step of their own group only."""
        return True

    def bind(self, stats: Sequence[Stats], grid: Grid) -> BoundOverTensor:
        """The shared number of the largest weight of all tensors given; 1 where all weights are 0."""
        sizes = [larger_side(each, None).amax((-2, -1), keepdim=True) for each in stats]
        largest = sizes[0]
        for size in sizes[1:]:
            other = size if size.shape == largest.shape else size.amax().expand_as(largest)
            largest = torch.maximum(largest, other.to(largest.device))
        ends = torch.finfo(torch.float32)
        if self.times:
            shared = (largest / (grid.hi * self.top)).clamp_min(ends.tiny)
        else:
            shared = (grid.hi * self.top / largest).clamp_max(ends.max)
        return BoundOverTensor(self, torch.where(largest > 0, shared, 1.0))

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """`step = b / t` (or `b * t`), one rounding."""
        return Scale(self.step(self.blocks.decode(parts["block"]), parts["tensor"]), None, parts)

    def step(self, b: Tensor, shared: Tensor) -> Tensor:
        """Steps of groups with the numbers `b`."""
        return b * shared if self.times else b / shared


@dataclass(frozen=True, slots=True, eq=False)
class BoundOverTensor(BySize):
    """`OverTensor` for weights whose shared number is known.

    Attributes:
        rule: the rule.
        shared: `t`, `[..., 1, 1]` float32.
    """

    rule: OverTensor
    shared: Tensor

    def matrix(self, i: int) -> BoundOverTensor:
        """The rule of one matrix of a stack."""
        return BoundOverTensor(self.rule, self.shared.reshape(-1, 1, 1)[i])

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """The nearest number of the grid for each group; instead of 0 the rule's least one."""
        blocks = self.rule.blocks
        size = larger_side(stats, knobs) / grid.hi
        wanted = size / self.shared if self.rule.times else size * self.shared
        nearest = blocks.snap(wanted.detach())
        b = replace_ste(wanted, torch.where(nearest == 0, self.rule.least, nearest))
        if b.requires_grad:
            return Scale(self.rule.step(b, self.shared), None)
        return self.rule.read({"block": blocks.encode(b), "tensor": self.shared})
