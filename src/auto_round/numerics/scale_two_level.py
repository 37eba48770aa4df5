"""Two-level scales: neighbouring groups share a float16 number, each holds a small whole multiple of it.

Source: llama.cpp's K-quants (`ggml-common.h: block_q2_K ... block_q6_K`), arithmetic of gguf-py 0.19
`quants.py`: `(d * sc) * n - (dmin * mn)`, every product rounded to float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid
from auto_round.numerics.scale import (
    Knobs,
    Moments,
    PartSpec,
    Scale,
    ScaleRule,
    SignedMax,
    Stats,
    legal_step,
    signed_knobs,
)
from auto_round.numerics.scale_affine import Affine, affine_knobs, line, step_and_floor
from auto_round.numerics.ste import round_ste


def gather(x: Tensor, per: int) -> Tensor:
    """Numbers of the groups of each block: `[..., n_groups]` -> `[..., n_blocks, per]`, filled with 0."""
    missing = -x.shape[-1] % per
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.reshape(*x.shape[:-1], -1, per)


def join(blocks: Tensor, n_groups: int) -> Tensor:
    """Inverse of `gather`: `[..., n_blocks, per]` -> `[..., n_groups]`."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :n_groups]


@dataclass(frozen=True, slots=True)
class Multiples:
    """How the groups of a block share one float16 number: each has a whole multiple of it.

    Attributes:
        bits: width of a multiple.
        per: groups in a block.
        least: smallest multiple; a negative one makes multiples signed, and they are never 0.
    """

    bits: int
    per: int
    least: int

    @property
    def signed(self) -> bool:
        """Whether multiples may be negative."""
        return self.least < 0

    @property
    def anchor(self) -> int:
        """The multiple that the largest number of a block has: the end of the range farthest from 0."""
        return self.least if self.signed else (1 << self.bits) - 1

    @property
    def most(self) -> int:
        """Largest multiple."""
        return self.least + (1 << self.bits) - 1 if self.signed else self.anchor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of multiples in memory."""
        return torch.int8 if self.signed else torch.uint8

    def share(self, x: Tensor) -> Tensor:
        """Shared number of each block so that its largest number becomes the anchor, `[..., n_blocks]`."""
        blocks = gather(x, self.per)
        largest = blocks.amax(-1)
        if self.signed:
            largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return legal_step(largest / self.anchor, torch.float16)

    def divide(self, x: Tensor, shared: Tensor) -> Tensor:
        """Multiple of each group, float32, straight-through gradient.

        A multiple of 0 would make all weights of the group alike; the one next to it contains that case,
        since weights are rounded to the nearest number.
        """
        ratio = join(gather(x, self.per) / shared.unsqueeze(-1), x.shape[-1])
        multiple = round_ste(ratio).clamp(self.least, self.most)
        if self.signed:
            multiple = multiple + (multiple == 0)
        return multiple

    def value(self, shared: Tensor, multiple: Tensor) -> Tensor:
        """Numbers `[..., n_groups]` of shared numbers `[..., n_blocks]` and multiples, float32."""
        return join(gather(multiple, self.per) * shared.unsqueeze(-1), multiple.shape[-1])

    def stored(self, names: tuple[str, str], groups: Sequence[int]) -> dict[str, PartSpec]:
        """The shared number and the multiples of scales of shape `groups`."""
        blocks = (*groups[:-1], -(-groups[-1] // self.per))
        return {
            names[0]: PartSpec(torch.float16, blocks, 16),
            names[1]: PartSpec(self.dtype, tuple(groups), self.bits),
        }

    def read(self, shared: Tensor, multiple: Tensor) -> Tensor:
        """Numbers `[..., n_groups]` float32 of stored parts."""
        return self.value(shared.to(torch.float32), multiple.to(torch.float32))


class TwoLevel(ScaleRule, Protocol):
    """A rule whose groups share numbers: what the search needs beyond `ScaleRule`."""

    @property
    def steps(self) -> Multiples:
        """How steps share a number."""
        ...

    @property
    def floors(self) -> Multiples | None:
        """How floors do; None without floors."""
        ...

    def best(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Step and floor of each group of least squares, were they free."""
        ...

    def knobs(self, stats: Stats, grid: Grid, step: Tensor, floor: Tensor | None) -> Knobs:
        """Knobs that lead to these steps and floors, as far as knobs of 0 ... 16 can."""
        ...


@dataclass(frozen=True, slots=True)
class SharedSigned:
    """Symmetric groups whose signed steps are multiples of one number a block: Q3_K and Q6_K.

    Attributes:
        steps: how steps share a number.
    """

    steps: Multiples

    @property
    def floors(self) -> None:
        """There are none."""
        return

    @property
    def alone(self) -> SignedMax:
        """The rule of a group with an unrounded step of its own.

        Ranges wider than measured are tried too, and extremes at one end only: steps that share a number lose
        less by it afterwards (0.8 % less error in the end at 3 bits, 3 % at 6; docs/LOG.md).
        """
        return SignedMax(torch.float32, reach=(0.45, 1.28), flipped_bits=0)

    def stored(self, groups: Sequence[int]) -> Mapping[str, PartSpec]:
        """`d` of each block and `sc` of each group."""
        return self.steps.stored(("d", "sc"), groups)

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """Step of `SignedMax`, then its multiple of the block's shared number."""
        wanted = self.alone.fit(stats, grid, knobs).step
        d = self.steps.share(wanted)
        sc = self.steps.divide(wanted, d)
        if d.requires_grad:
            return Scale(self.steps.value(d, sc), None)
        return self.read({"d": d.to(torch.float16), "sc": sc.to(self.steps.dtype)})

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Steps as stored."""
        return Scale(self.steps.read(parts["d"], parts["sc"]), None, parts)

    def best(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Step through zero; the floor is 0."""
        step = moments.nw / moments.nn.clamp_min(1e-30)
        return step, torch.zeros_like(step)

    def knobs(self, stats: Stats, grid: Grid, step: Tensor, floor: Tensor | None) -> Knobs:
        """The extreme is the step times the lowest number."""
        return signed_knobs(stats, step.abs() * -grid.lo, step > 0)


@dataclass(frozen=True, slots=True)
class SharedAffine:
    """Asymmetric groups whose steps and floors are multiples of two numbers a block: Q2_K, Q4_K and Q5_K.

    Attributes:
        steps: how steps share a number.
        floors: how floors do.
    """

    steps: Multiples
    floors: Multiples

    @property
    def alone(self) -> Affine:
        """The rule of a group with an unrounded step and floor of its own."""
        return Affine(torch.float32)

    def stored(self, groups: Sequence[int]) -> Mapping[str, PartSpec]:
        """`d` and `dmin` of each block, `sc` and `mn` of each group."""
        return {**self.steps.stored(("d", "sc"), groups), **self.floors.stored(("dmin", "mn"), groups)}

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """Step and floor of `Affine`, then their multiples of the block's shared numbers."""
        wanted, wanted_floor = step_and_floor(stats, grid, knobs)
        d, dmin = self.steps.share(wanted), self.floors.share(wanted_floor)
        sc, mn = self.steps.divide(wanted, d), self.floors.divide(wanted_floor, dmin)
        if d.requires_grad:
            return Scale(self.steps.value(d, sc), None, floor=self.floors.value(dmin, mn))
        return self.read(
            {
                "d": d.to(torch.float16),
                "sc": sc.to(self.steps.dtype),
                "dmin": dmin.to(torch.float16),
                "mn": mn.to(self.floors.dtype),
            }
        )

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Steps and floors as stored."""
        step = self.steps.read(parts["d"], parts["sc"])
        return Scale(step, None, parts, self.floors.read(parts["dmin"], parts["mn"]))

    def best(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Those of a line."""
        return line(moments)

    def knobs(self, stats: Stats, grid: Grid, step: Tensor, floor: Tensor | None) -> Knobs:
        """Both ends of the range."""
        return affine_knobs(stats, grid, step, torch.zeros_like(step) if floor is None else floor)
