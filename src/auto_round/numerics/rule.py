"""Scale rules: what is stored of a weight's scales, how it is found in a group, how ranges are searched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from auto_round.numerics.grid import Grid
from auto_round.numerics.scale import Knobs, PartSpec, Scale, Stats

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search.

    Attributes:
        points: sizes of the whole range that are tried first.
        rounds: rounds of local moves and least-squares refits after that.
        shared_rounds: rounds over numbers that groups share.
        distances: of the second search, where products of inputs are known: how many distances from the first
            one's knobs are tried, up to `search_groups.FARTHEST`. Then follow `distances // 6` rounds of
            refits and moves.
        along: extra weight of errors along a group's own weights, where products are not known; the formula
            stands at `band.Band`.
        sweeps: how often all codes are moved to where errors cancel (`descent`), where products are known.
    """

    points: int
    rounds: int
    shared_rounds: int
    distances: int
    along: float = 0.0
    sweeps: int = 0


@dataclass(frozen=True, slots=True)
class SearchTask:
    """Some rows of a weight whose ranges are searched.

    Attributes:
        grid: numbers that weights are rounded to.
        stats: measured ranges, `[rows, n_groups]`.
        w: the weights, `[rows, n_groups, width]` float32.
        importance: what a squared error costs at each place of a row, `[1, n_groups, width]`; None for 1.
        products: mean products of the inputs of a group, see `Importance.pieces`; None where not known.
    """

    grid: Grid
    stats: Stats
    w: Tensor
    importance: Tensor | None
    products: Tensor | None


class BoundRule(Protocol):
    """A scale rule that knows its shared numbers: the rest follows from a group's own range and knobs."""

    def matrix(self, i: int) -> BoundRule:
        """The rule of one matrix of a stack of weights `[n, out, in]`."""
        ...

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """Scale of each group, differentiable in the knobs; `parts` is filled only outside of autograd."""
        ...

    def search(self, task: SearchTask, effort: Effort) -> Knobs:
        """Knobs of a small error for some rows of a weight, never worse than the measured range."""
        ...


class ScaleRule(Protocol):
    """What is stored of a weight's scales, and how they are found.

    A number that several rows or several weights share depends on all of them. `bind` sees their ranges and
    settles such numbers; the rule that it returns works on any part of the rows.
    """

    @property
    def stored(self) -> Mapping[str, PartSpec]:
        """Stored parts: names and order of `Scale.parts`."""
        ...

    @property
    def tunable(self) -> bool:
        """Whether knobs may be learned: they move the scale of their own group and no other's."""
        ...

    def bind(self, stats: Sequence[Stats], grid: Grid) -> BoundRule:
        """The rule with its shared numbers settled.

        Args:
            stats: ranges of the whole weight, then of other weights that must get the same shared numbers.
            grid: numbers that weights are rounded to.
        """
        ...

    def read(self, parts: Mapping[str, Tensor]) -> Scale:
        """Scale of stored parts; `read(fit(...).parts)` equals `fit(...)` bit for bit."""
        ...


class SelfBound:
    """A rule without numbers shared by several rows or weights: binding changes nothing."""

    __slots__ = ()

    def bind(self, stats: Sequence[Stats], grid: Grid) -> Self:
        """Itself."""
        return self

    def matrix(self, i: int) -> Self:
        """Itself."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class KnownScale:
    """A rule that has been given its scale: it is the same whatever the range.

    Attributes:
        scale: of all groups.
    """

    scale: Scale

    def matrix(self, i: int) -> KnownScale:
        """The rule of one matrix of a stack."""
        parts = {name: part[i] for name, part in self.scale.parts.items()}
        zero, floor = (None if x is None else x[i] for x in (self.scale.zero, self.scale.floor))
        return KnownScale(Scale(self.scale.step[i], zero, parts, floor))

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """The scale."""
        return self.scale

    def search(self, task: SearchTask, effort: Effort) -> Knobs:
        """Nothing is left to be searched: the measured range."""
        ones = torch.ones_like(task.stats.lo)
        return Knobs(ones, ones)


def stored_bits(rule: ScaleRule, groups: Sequence[int]) -> int:
    """Bits that scales of shape `groups` `[..., rows, n_groups]` take on disk."""
    return sum(math.prod(part.shape(groups)) * part.bits for part in rule.stored.values())
