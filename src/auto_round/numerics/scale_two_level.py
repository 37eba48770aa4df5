"""Two-level scales: a group's step is a small whole multiple of a float16 number that its block shares.

Source: llama.cpp's K-quants (`ggml-common.h: block_q2_K ... block_q6_K`), arithmetic of gguf-py 0.19
`quants.py`: `(d * sc) * n - (dmin * mn)`, every product rounded to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid
from auto_round.numerics.multiples import Multiples
from auto_round.numerics.rule import Effort, SearchTask, SelfBound
from auto_round.numerics.scale import Knobs, Moments, PartSpec, Scale, Stats
from auto_round.numerics.scale_affine import Affine, affine_knobs, line, step_and_floor
from auto_round.numerics.scale_integer import SignedMax, signed_knobs
from auto_round.numerics.search_shared import search_shared

TUNABLE = False
"""Ranges of these formats stay as searched. The group of the largest step decides the shared number, so
tuning its range would move the steps of the whole block, and rounding offsets would never settle
(docs/LOG.md)."""


@dataclass(frozen=True, slots=True)
class SharedSigned(SelfBound):
    """Symmetric groups with steps `d * sc`: `d` for each block, a signed `sc` for each group. Q3_K and Q6_K.

    Attributes:
        steps: how a block stores its steps: `d` and the range of `sc`.
    """

    steps: Multiples
    tunable: ClassVar[bool] = TUNABLE

    @property
    def floors(self) -> None:
        """None: symmetric groups have no floors."""
        return

    @property
    def alone(self) -> SignedMax:
        """The rule of a group with an unrounded step of its own.

        Its search also tries ranges wider than measured, and always maps the larger extreme to the grid's
        lowest number: such steps lose less when they become multiples of a shared number (0.8 % less error in
        the end at 3 bits, 3 % at 6; docs/LOG.md).
        """
        return SignedMax(torch.float32, reach=(0.45, 1.28), flipped_bits=0)

    @property
    def stored(self) -> Mapping[str, PartSpec]:
        """`d` of each block and `sc` of each group."""
        return self.steps.stored("d", "sc")

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

    def search(self, task: SearchTask, effort: Effort) -> Knobs:
        """Each group by itself, then with what blocks share."""
        return search_shared(self, task, effort)

    def best(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Least-squares step `sum(i * n * w) / sum(i * n * n)`; the floor is 0."""
        step = moments.nw / moments.nn.clamp_min(1e-30)
        return step, torch.zeros_like(step)

    def knobs(self, stats: Stats, grid: Grid, step: Tensor, floor: Tensor | None) -> Knobs:
        """Knobs that lead to these steps: the larger extreme becomes `step * grid.lo`."""
        return signed_knobs(stats, step.abs() * -grid.lo, step > 0)


@dataclass(frozen=True, slots=True)
class SharedAffine(SelfBound):
    """Asymmetric groups with steps `d * sc` and floors `dmin * mn`: Q2_K, Q4_K and Q5_K.

    Attributes:
        steps: how a block stores its steps: `d` and the range of `sc`.
        floors: how a block stores its floors: `dmin` and the range of `mn`.
    """

    steps: Multiples
    floors: Multiples
    tunable: ClassVar[bool] = TUNABLE

    @property
    def alone(self) -> Affine:
        """The rule of a group with an unrounded step and floor of its own."""
        return Affine(torch.float32)

    @property
    def stored(self) -> Mapping[str, PartSpec]:
        """`d` and `dmin` of each block, `sc` and `mn` of each group."""
        return {**self.steps.stored("d", "sc"), **self.floors.stored("dmin", "mn")}

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

    def search(self, task: SearchTask, effort: Effort) -> Knobs:
        """Each group by itself, then with what blocks share."""
        return search_shared(self, task, effort)

    def best(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Step and floor of least squared error."""
        return line(moments)

    def knobs(self, stats: Stats, grid: Grid, step: Tensor, floor: Tensor | None) -> Knobs:
        """Both ends of the range."""
        return affine_knobs(stats, grid, step, torch.zeros_like(step) if floor is None else floor)
