"""Second level of the range search: numbers that the groups of a block share, and each group's multiples.

The first level gives every group the step and floor it would like to have. Here each block finds shared
numbers of which these are nearly whole multiples. With codes kept, the error of a group is a quadratic
function of its step and floor, so that many shared numbers are compared through a few sums; what looks best
is then tried on the weights themselves, and kept where it is. Last, multiples move by one where that helps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from auto_round.errors import InternalError
from auto_round.numerics.band import Errors, fold
from auto_round.numerics.grid import Grid
from auto_round.numerics.multiples import Multiples, gather, join
from auto_round.numerics.scale import Knobs, Moments, Scale, Stats
from auto_round.numerics.search_groups import Effort, GroupRule, SearchTask, search_groups

FIRST_POINTS = 24
FIRST_ROUNDS = 3
"""The first level's effort: more would be lost again in rounding to multiples."""

REACH = 1.2
"""Shared numbers are tried as far as moves the largest number of a block by so many multiples."""
TRIES = 9
"""Shared numbers that are tried."""


MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
"""Moves of the multiples of a group's step and floor; the first two leave the floor alone."""


class TwoLevel(Protocol):
    """A rule whose groups share numbers, as its search sees it."""

    @property
    def steps(self) -> Multiples:
        """How steps share a number."""
        ...

    @property
    def floors(self) -> Multiples | None:
        """How floors do; None without floors."""
        ...

    @property
    def alone(self) -> GroupRule:
        """The rule of a group with unrounded numbers of its own."""
        ...

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """Scale of each group."""
        ...

    def best(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Step and floor of each group of least squares, were they free."""
        ...

    def knobs(self, stats: Stats, grid: Grid, step: Tensor, floor: Tensor | None) -> Knobs:
        """Knobs that lead to these steps and floors, as far as knobs of 0 ... 16 can."""
        ...


def search_shared(rule: TwoLevel, task: SearchTask, effort: Effort) -> Knobs:
    """Knobs of smallest error: first of groups by themselves, then with what they share."""
    first = replace(effort, points=min(effort.points, FIRST_POINTS), rounds=FIRST_ROUNDS)
    knobs, band = search_groups(rule.alone, task, first)
    return SharedSearch(rule, task.grid, task.stats, band).search(knobs, effort.shared_rounds)


@dataclass(frozen=True, slots=True)
class Level:
    """Shared numbers and multiples of the steps, or of the floors, of a band of rows.

    Attributes:
        how: how they are shared.
        shared: `[rows, n_blocks]` float32, each a float16 number.
        multiple: `[rows, n_groups]` float32, whole numbers.
    """

    how: Multiples
    shared: Tensor
    multiple: Tensor

    @property
    def value(self) -> Tensor:
        """Step or floor of each group."""
        return self.how.value(self.shared, self.multiple)

    def where(self, better: Tensor, other: Level) -> Level:
        """Blocks of `other` where `better` `[rows, n_blocks]`, else own ones."""
        return Level(
            self.how,
            torch.where(better, other.shared, self.shared),
            _where(self.how, better, other.multiple, self.multiple),
        )

    def moved(self, by: int) -> Level:
        """All multiples moved by one inside their range; the anchor stays, a block needs one there."""
        moved = (self.multiple + by).clamp(self.how.least, self.how.most)
        if self.how.signed:
            moved = torch.where(moved == 0, moved + by, moved)
        return Level(
            self.how, self.shared, torch.where(self.multiple == self.how.anchor, self.multiple, moved)
        )

    def only(self, groups: Tensor, other: Level) -> Level:
        """Multiples of `other` where `groups` `[rows, n_groups]`."""
        return Level(self.how, self.shared, torch.where(groups, other.multiple, self.multiple))


def fit_level(how: Multiples, wanted: Tensor, curve: Tensor) -> Level:
    """Level of about the smallest `sum(curve * (value - wanted)**2)` in each block.

    Args:
        how: how numbers are shared.
        wanted: step or floor that each group would like, `[rows, n_groups]`.
        curve: what a squared distance from it costs, same shape.
    """
    plain, pinned, width = how.share(wanted), _largest(how, wanted), REACH / abs(how.anchor)
    best, least = None, None
    for factor in torch.linspace(1 - width, 1 + width, TRIES, dtype=torch.float32, device="cpu").tolist():
        level = _with_shared(Level(how, plain, wanted), plain * factor)
        multiple = torch.where(pinned, float(how.anchor), how.divide(wanted, level.shared))
        level = Level(how, level.shared, multiple)
        cost = _sums(how, (level.value - wanted).square_().mul_(curve))
        if best is None or least is None:
            best, least = level, cost
        else:
            best, least = best.where(cost < least, level), torch.minimum(cost, least)
    if best is None:
        raise InternalError("no shared number was tried")
    return best


def _largest(how: Multiples, wanted: Tensor) -> Tensor:
    """Marks the largest number of each block, `[rows, n_groups]`; none where all are 0."""
    blocks = gather(wanted, how.per).abs()
    at = blocks.argmax(-1, keepdim=True)
    marks = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, at, blocks.amax(-1, keepdim=True) > 0)
    return marks.reshape(*wanted.shape[:-1], -1)[..., : wanted.shape[-1]]


@dataclass(frozen=True, slots=True)
class State:
    """Levels of a band and the error they lead to.

    Attributes:
        steps: of the steps.
        floors: of the floors; None where the format has none.
        error: `[rows, n_groups]`, on the weights themselves.
    """

    steps: Level
    floors: Level | None
    error: Tensor

    @property
    def scale(self) -> Scale:
        """Scale of each group."""
        return Scale(self.steps.value, None, floor=None if self.floors is None else self.floors.value)


class SharedSearch:
    """Search over the blocks of a band of rows."""

    def __init__(self, rule: TwoLevel, grid: Grid, stats: Stats, band: Errors) -> None:
        self._rule, self._grid, self._stats, self._band = rule, grid, stats, band

    def search(self, knobs: Knobs, rounds: int) -> Knobs:
        """Knobs of smallest error, beginning from what each group would like."""
        state = self._read(self._rule.fit(self._stats, self._grid, knobs))
        began = state.error
        wish = self._rule.alone.fit(self._stats, self._grid, knobs)
        for _ in range(rounds):
            moments = self._band.moments(self._grid, wish)
            state = self._better(state, self._propose(moments))
            state = self._better(state, self._refine(state))
            state = self._nudge(state)
            wish = state.scale
        state = self._better(state, self._refine(state))
        return self._keep(knobs, began, state)

    def _read(self, scale: Scale) -> State:
        rule, parts = self._rule, scale.parts
        steps = Level(rule.steps, parts["d"].float(), parts["sc"].float())
        floors = None
        if rule.floors is not None:
            floors = Level(rule.floors, parts["dmin"].float(), parts["mn"].float())
        return self._state(steps, floors)

    def _state(self, steps: Level, floors: Level | None) -> State:
        scale = State(steps, floors, steps.multiple).scale
        return State(steps, floors, self._band.error(self._grid, scale))

    def _propose(self, moments: Moments) -> State:
        """Levels that come close to what suits the numbers of the weights."""
        step, floor = self._rule.best(moments)
        if self._rule.floors is None:
            return self._state(fit_level(self._rule.steps, step, moments.nn), None)
        # With the floor free to follow, a step off by e costs the variance of the numbers times e squared.
        spare = (moments.nn - moments.n.square() / moments.one).clamp_min(0)
        steps = fit_level(self._rule.steps, step, torch.where(floor > 0, spare, moments.nn))
        follows = floor + moments.n / moments.one * (steps.value - step)
        follows = torch.where(floor > 0, follows, floor).clamp_min(0)
        return self._state(steps, fit_level(self._rule.floors, follows, moments.one))

    def _refine(self, state: State) -> State:
        """Shared numbers of least squares for the numbers and multiples as they are."""
        m = self._band.moments(self._grid, state.scale)
        how, sc = state.steps.how, state.steps.multiple
        a, p = _sums(how, sc * sc * m.nn), _sums(how, sc * m.nw)
        if state.floors is None:
            return self._state(_with_shared(state.steps, p / a), None)
        mn = state.floors.multiple
        b, c, q = _sums(how, sc * mn * m.n), _sums(how, mn * mn * m.one), _sums(how, mn * m.w)
        free = a * c - b * b
        both = free > 1e-6 * a * c
        d = torch.where(both, (p * c - b * q) / free, p / a)  # not a number where all codes are 0
        dmin = torch.where(both, (b * p - a * q) / free, state.floors.shared)
        return self._state(_with_shared(state.steps, d), _with_shared(state.floors, dmin))

    def _better(self, old: State, new: State) -> State:
        """The better of two states, block by block."""
        how = old.steps.how
        better = _sums(how, new.error) < _sums(how, old.error)
        floors = old.floors
        if floors is not None and new.floors is not None:
            floors = floors.where(better, new.floors)
        return State(old.steps.where(better, new.steps), floors, _where(how, better, new.error, old.error))

    def _nudge(self, state: State) -> State:
        """Multiples moved by one where that lowers the error of their group."""
        for by_step, by_floor in MOVES if state.floors is not None else MOVES[:2]:
            moved = None if state.floors is None else state.floors.moved(by_floor)
            new = self._state(state.steps.moved(by_step), moved)
            better = new.error < state.error
            kept = None
            if state.floors is not None and new.floors is not None:
                kept = state.floors.only(better, new.floors)
            state = State(
                state.steps.only(better, new.steps), kept, torch.where(better, new.error, state.error)
            )
        return state

    def _keep(self, knobs: Knobs, began: Tensor, state: State) -> Knobs:
        """Knobs of the state, or those it began with, with error `began`, where these turn out better."""
        rule, grid, how = self._rule, self._grid, state.steps.how
        scale = state.scale
        found = rule.knobs(self._stats, grid, scale.step, scale.floor)
        error = self._band.error(grid, rule.fit(self._stats, grid, found))
        better = _sums(how, error) < _sums(how, began)
        return Knobs(_where(how, better, found.lo, knobs.lo), _where(how, better, found.hi, knobs.hi))


def _where(how: Multiples, blocks: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` in the groups of marked blocks `[rows, n_blocks]`, `no` in the others."""
    chosen = torch.where(blocks.unsqueeze(-1), gather(yes, how.per), gather(no, how.per))
    return join(chosen, no.shape[-1])


def _sums(how: Multiples, x: Tensor) -> Tensor:
    """Sum over the groups of each block, `[rows, n_blocks]`."""
    return fold(gather(x, how.per).clone(), -1)


def _with_shared(level: Level, shared: Tensor) -> Level:
    """The level with other shared numbers, rounded to float16; unusable ones are left as they were."""
    rounded = shared.to(torch.float16).to(torch.float32)
    usable = torch.isfinite(rounded) & ((rounded != 0) if level.how.signed else (rounded > 0))
    return Level(level.how, torch.where(usable, rounded, level.shared), level.multiple)
