"""Range search of two-level scales: the numbers that a block shares, and the multiple of each group.

A group's step is `d * sc`, its floor `dmin * mn`: `d` and `dmin` are shared by the groups of a block, `sc`
and `mn` are small whole numbers of each group. The search takes these steps:

1. Each group finds the step and floor that suit it best, as if nothing were shared (`search_groups`).
2. Each block looks for `d` and `dmin` of which these are nearly whole multiples. While codes stay as they
   are, the error of a group is a quadratic function of its step and floor, so a few sums (`Moments`) tell the
   error for many `d` and `dmin`.
3. The best of them are tried on the weights, which are rounded anew, and kept where the error is smaller.
4. Multiples move by one where that lowers the error.
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
from auto_round.numerics.rule import Effort, SearchTask
from auto_round.numerics.scale import Knobs, Moments, Scale, Stats
from auto_round.numerics.search_groups import GroupRule, search_groups

FIRST_POINTS = 24
FIRST_ROUNDS = 3
"""Effort of the search of single groups: a finer result would be lost in rounding to multiples."""

REACH = 1.2
"""How far shared numbers are tried on both sides, measured at the largest number of a block: so many
multiples more or less, factors of `1 - REACH / |anchor|` to `1 + REACH / |anchor|`."""
TRIES = 9
"""How many shared numbers are tried in that range."""


MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
"""What is added to the multiples of a group's step and of its floor; the first two leave the floor alone."""


class TwoLevel(Protocol):
    """What the search needs of a rule whose groups share numbers."""

    @property
    def steps(self) -> Multiples:
        """How a block stores its steps: a shared number and whole multiples of it."""
        ...

    @property
    def floors(self) -> Multiples | None:
        """How a block stores its floors; None for a rule without floors."""
        ...

    @property
    def alone(self) -> GroupRule:
        """The rule that each group would have if it shared nothing: step and floor are not rounded."""
        ...

    def fit(self, stats: Stats, grid: Grid, knobs: Knobs | None = None) -> Scale:
        """Scale of each group."""
        ...

    def best(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Least-squares step and floor of each group, as if it shared nothing."""
        ...

    def knobs(self, stats: Stats, grid: Grid, step: Tensor, floor: Tensor | None) -> Knobs:
        """Knobs that lead to these steps and floors, as far as knobs of 0 ... 16 can."""
        ...


def search_shared(rule: TwoLevel, task: SearchTask, effort: Effort) -> Knobs:
    """Knobs of the smallest error found: each group by itself first, then with its block's shared numbers."""
    first = replace(effort, points=min(effort.points, FIRST_POINTS), rounds=FIRST_ROUNDS)
    knobs, band = search_groups(rule.alone, task, first)
    return SharedSearch(rule, task.grid, task.stats, band).search(knobs, effort.shared_rounds)


@dataclass(frozen=True, slots=True)
class Level:
    """The steps (or the floors) of a band of rows, each as `shared * multiple`.

    Attributes:
        how: which groups share a number, and the range of multiples.
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
        """A level with the blocks of `other` where `better` `[rows, n_blocks]` is True, else its own."""
        return Level(
            self.how,
            torch.where(better, other.shared, self.shared),
            _where(self.how, better, other.multiple, self.multiple),
        )

    def moved(self, by: int) -> Level:
        """All multiples plus `by`, kept in their range; those at the anchor stay, since a block needs one."""
        moved = (self.multiple + by).clamp(self.how.least, self.how.most)
        if self.how.signed:
            moved = torch.where(moved == 0, moved + by, moved)
        return Level(
            self.how, self.shared, torch.where(self.multiple == self.how.anchor, self.multiple, moved)
        )

    def only(self, groups: Tensor, other: Level) -> Level:
        """A level with the multiples of `other` where `groups` `[rows, n_groups]` is True, else its own."""
        return Level(self.how, self.shared, torch.where(groups, other.multiple, self.multiple))


def fit_level(how: Multiples, wanted: Tensor, curve: Tensor) -> Level:
    """Shared numbers and multiples with a small `sum(curve * (shared * multiple - wanted)**2)` in each block.

    Args:
        how: which groups share a number, and the range of multiples.
        wanted: the best step (or floor) of each group by itself, `[rows, n_groups]`.
        curve: how fast a group's error grows away from it: `curve * distance**2`, same shape.
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
    """True at the group of largest magnitude in each block, `[rows, n_groups]`; nowhere if all are 0."""
    blocks = gather(wanted, how.per).abs()
    at = blocks.argmax(-1, keepdim=True)
    marks = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, at, blocks.amax(-1, keepdim=True) > 0)
    return marks.reshape(*wanted.shape[:-1], -1)[..., : wanted.shape[-1]]


@dataclass(frozen=True, slots=True)
class State:
    """A candidate of the search: steps and floors of a band, and the error of rounding with them.

    Attributes:
        steps: shared numbers and multiples of the steps.
        floors: those of the floors; None where the format has none.
        error: of each group, `[rows, n_groups]`.
    """

    steps: Level
    floors: Level | None
    error: Tensor

    @property
    def scale(self) -> Scale:
        """Scale of each group."""
        return Scale(self.steps.value, None, floor=None if self.floors is None else self.floors.value)


class SharedSearch:
    """Search for the shared numbers and multiples of each block of a band of rows."""

    def __init__(self, rule: TwoLevel, grid: Grid, stats: Stats, band: Errors) -> None:
        self._rule, self._grid, self._stats, self._band = rule, grid, stats, band

    def search(self, knobs: Knobs, rounds: int) -> Knobs:
        """Knobs of the smallest error found.

        Args:
            knobs: the best knobs of each group by itself.
            rounds: how often shared numbers are proposed, fitted and moved.
        """
        state = self._read(self._rule.fit(self._stats, self._grid, knobs))
        began = state.error
        # The scale that codes are taken from: at first each group's own, then the best that blocks can store.
        scale = self._rule.alone.fit(self._stats, self._grid, knobs)
        for _ in range(rounds):
            moments = self._band.moments(self._grid, scale)
            state = self._better(state, self._propose(moments))
            state = self._better(state, self._refine(state))
            state = self._nudge(state)
            scale = state.scale
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
        """Shared numbers and multiples near the least-squares step and floor of each group."""
        step, floor = self._rule.best(moments)
        if self._rule.floors is None:
            return self._state(fit_level(self._rule.steps, step, moments.nn), None)
        # If the step is off by e and the floor follows, the error grows by e**2 * sum(i * (n - mean(n))**2).
        spare = (moments.nn - moments.n.square() / moments.one).clamp_min(0)
        steps = fit_level(self._rule.steps, step, torch.where(floor > 0, spare, moments.nn))
        follows = floor + moments.n / moments.one * (steps.value - step)
        follows = torch.where(floor > 0, follows, floor).clamp_min(0)
        return self._state(steps, fit_level(self._rule.floors, follows, moments.one))

    def _refine(self, state: State) -> State:
        """Least-squares `d` and `dmin` of each block while codes and multiples stay.

        The minimum of `sum(i * (n * d * sc - dmin * mn - w)**2)` over a block solves `a d - b dmin = p` and
        `b d - c dmin = q`, with the sums below.
        """
        m = self._band.moments(self._grid, state.scale)
        how, sc = state.steps.how, state.steps.multiple
        a, p = _sums(how, sc * sc * m.nn), _sums(how, sc * m.nw)
        if state.floors is None:
            return self._state(_with_shared(state.steps, p / a), None)
        mn = state.floors.multiple
        b, c, q = _sums(how, sc * mn * m.n), _sums(how, mn * mn * m.one), _sums(how, mn * m.w)
        free = a * c - b * b
        both = free > 1e-6 * a * c
        d = torch.where(both, (p * c - b * q) / free, p / a)  # NaN where all codes are 0
        dmin = torch.where(both, (b * p - a * q) / free, state.floors.shared)
        return self._state(_with_shared(state.steps, d), _with_shared(state.floors, dmin))

    def _better(self, old: State, new: State) -> State:
        """Of each block, the state with the smaller error."""
        how = old.steps.how
        better = _sums(how, new.error) < _sums(how, old.error)
        floors = old.floors
        if floors is not None and new.floors is not None:
            floors = floors.where(better, new.floors)
        return State(old.steps.where(better, new.steps), floors, _where(how, better, new.error, old.error))

    def _nudge(self, state: State) -> State:
        """Each group's multiples moved by one where that lowers its error."""
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
        """Knobs that lead to `state`; in blocks where their error is not below `began`, the `knobs` given."""
        rule, grid, how = self._rule, self._grid, state.steps.how
        scale = state.scale
        found = rule.knobs(self._stats, grid, scale.step, scale.floor)
        error = self._band.error(grid, rule.fit(self._stats, grid, found))
        better = _sums(how, error) < _sums(how, began)
        return Knobs(_where(how, better, found.lo, knobs.lo), _where(how, better, found.hi, knobs.hi))


def _where(how: Multiples, blocks: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` for groups: `yes` in those whose block `[rows, n_blocks]` is True, `no` in the others."""
    chosen = torch.where(blocks.unsqueeze(-1), gather(yes, how.per), gather(no, how.per))
    return join(chosen, no.shape[-1])


def _sums(how: Multiples, x: Tensor) -> Tensor:
    """Sum over the groups of each block, `[rows, n_blocks]`."""
    return fold(gather(x, how.per).clone(), -1)


def _with_shared(level: Level, shared: Tensor) -> Level:
    """`level` with `shared` rounded to float16; the old number stays where the new one is 0 or not finite."""
    rounded = shared.to(torch.float16).to(torch.float32)
    usable = torch.isfinite(rounded) & ((rounded != 0) if level.how.signed else (rounded > 0))
    return Level(level.how, torch.where(usable, rounded, level.shared), level.multiple)
