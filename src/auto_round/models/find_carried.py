"""Finds what blocks hand on to later blocks beside hidden states, and what it looks like.

Two ways are known. Blocks fill a mapping that all of them are given: the last blocks of Gemma 3n and Gemma 4
read the keys and values of earlier ones from it. Or a block returns something behind the hidden states, and
the model gives it to the next block as it is: choices of tokens of GLM's sparse attention, a router's states.

A stub computes neither, so names come from stubs, and shapes from blocks that run without weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from auto_round.facts.carried import Carried, CarriedTensor, Path, tensors_in
from auto_round.facts.flow import BlockCall, States
from auto_round.facts.nested import map_tensors
from auto_round.models.earlier_results import StubCall, arguments, untraceable
from auto_round.models.materialize import META
from auto_round.models.rehearsal import WANTS_WEIGHTS, RehearsedBlock, WeightlessProducts
from auto_round.models.source import Trace

Weightless = Callable[[Sequence["BlockCall | None"], Sequence[States]], Iterable[RehearsedBlock]]
"""Blocks that run without weights, one by one, from their calls and from what flows into each."""

ROWS = (1, 2)
"""Rows of two runs, by which the axis of rows is told."""
SHORT = 16
"""Tokens of the run that tells which block is the first to hand on what. All blocks run then; in rows of the
wanted length only those up to the last of these."""


@dataclass(frozen=True, slots=True)
class Carrier:
    """How a value is handed on.

    Attributes:
        name: parameter of the blocks that takes it.
        place: place in a block's output; None where blocks fill a mapping.
        empty: that mapping, empty; None where there is none.
    """

    name: str
    place: int | None
    empty: MutableMapping[Any, Any] | None


def find_carriers(seen: Sequence[StubCall]) -> tuple[Carrier, ...]:
    """Values that the blocks of a list hand on.

    Args:
        seen: calls of stubs, in order, while these returned something of their own behind what flows.
    """
    given = [dict(_arguments(passed)) for passed in seen]
    names = dict.fromkeys(name for each in given for name in each)
    columns = {name: [each.get(name) for each in given] for name in names}
    filled = [
        Carrier(name, None, copy.copy(first))
        for name, (first, *later) in columns.items()
        if _is_empty_mapping(first) and later and all(value is first for value in later)
    ]
    returned = [
        Carrier(name, place, None)
        for name, values in columns.items()
        if (place := _place(values, seen)) is not None
    ]
    return (*filled, *returned)


def _arguments(passed: StubCall) -> Iterator[tuple[str, Any]]:
    return arguments(passed.call, passed.parameters)


def _is_empty_mapping(value: Any) -> bool:
    return isinstance(value, MutableMapping) and not value


def _place(values: Sequence[Any], seen: Sequence[StubCall]) -> int | None:
    """Where each block returns what the next one is given; None where one is given anything else.

    A model may give all blocks what the first one returned, say: then nothing is known of the others.
    """
    first, *later = values
    if first is not None or not later:
        return None
    places = (
        {place for place, part in before.beside.items() if part is value and isinstance(value, Tensor)}
        for before, value in zip(seen, later, strict=False)
    )
    return min(set.intersection(*places), default=None)


def look_at_carried(
    carriers: Sequence[Carrier], traced: Callable[[int, int], Trace], length: int, blocks: Weightless
) -> list[tuple[Carried, ...]]:
    """What each block of a list is given of the values that blocks hand on.

    Args:
        carriers: how they are handed on.
        traced: what the blocks receive for that many rows and tokens, without what they hand on.
        length: tokens of a row.
        blocks: that run without weights.

    Raises:
        UnsupportedError: a block does not run without weights, rows cannot be told apart, or a value is not
            only handed on.
    """
    values = list(_values(carriers, traced(1, SHORT), blocks))
    for earlier, later in pairwise(values):
        for carrier, was, now in zip(carriers, earlier, later, strict=True):
            _check_it_stays(carrier.name, was, now)
    *before, last = ([value.keys() for value in each] for each in values)

    def complete(rows: int, *, shapes: bool) -> list[Mapping[Path, Tensor]]:
        return _complete(_values(carriers, traced(rows, length), blocks, shapes=shapes), last)

    try:
        one, two = (complete(rows, shapes=True) for rows in ROWS)
    except WANTS_WEIGHTS:  # experts, say, which look at numbers
        one, two = (complete(rows, shapes=False) for rows in ROWS)
    pieces = [tuple(_pieces(a, b, c.name)) for c, a, b in zip(carriers, one, two, strict=True)]
    return [
        tuple(
            Carried(c.name, c.place, c.empty, p, frozenset(v))
            for c, p, v in zip(carriers, pieces, present, strict=True)
        )
        for present in before
    ]


def _check_it_stays(name: str, was: Mapping[Path, Tensor], now: Mapping[Path, Tensor]) -> None:
    """Refuse a value that a block takes away or makes into another: what the next is given is unknown."""
    for path, tensor in was.items():
        other = now.get(path)
        if other is None:
            raise untraceable(
                f'its blocks hand on "{name}", and not all that is given to a block is handed on'
            )
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            raise untraceable(f'its blocks hand on "{name}", whose shape or number type changes on the way')


def _complete(
    values: Iterable[list[Mapping[Path, Tensor]]], wanted: Sequence[Set[Path]]
) -> list[Mapping[Path, Tensor]]:
    """The first values that hold all that is wanted; the last ones where none do."""
    found: list[Mapping[Path, Tensor]] = []
    for found in values:
        if all(paths <= value.keys() for value, paths in zip(found, wanted, strict=True)):
            break
    return found


def _values(
    carriers: Sequence[Carrier], traced: Trace, blocks: Weightless, *, shapes: bool = False
) -> Iterator[list[Mapping[Path, Tensor]]]:
    """Tensors in each value before each block, and behind the last.

    Args:
        carriers: how values are handed on.
        traced: what the blocks receive.
        blocks: that run without weights.
        shapes: nothing is computed but shapes, which takes no time in long rows; not all code allows that.
    """
    values = [copy.copy(carrier.empty) for carrier in carriers]
    running = [index for index, call in enumerate(traced.calls) if call is not None]
    told = 0
    parts = blocks(traced.calls, [traced.states] * len(traced.calls))
    for index, part in zip(running, parts, strict=True):
        for _ in range(index - told + 1):
            yield [tensors_in(value) for value in values]
        told = index + 1
        args, kwargs = part.call.given(part.states)
        block = part.real.to(META) if shapes else part.real
        if shapes:
            args, kwargs = map_tensors(_without_numbers, (args, kwargs))
        kwargs |= {carrier.name: value for carrier, value in zip(carriers, values, strict=True)}
        try:
            with torch.no_grad(), nullcontext() if shapes else WeightlessProducts():  # type: ignore[no-untyped-call]
                output = block(*args, **kwargs)
        except WANTS_WEIGHTS as error:
            if shapes:
                raise
            names = ", ".join(carrier.name for carrier in carriers)
            raise untraceable(
                f'its blocks hand on "{names}", and block {part.index} does not run without weights '
                f"({type(error).__name__}: {str(error).strip()[:200]})"
            ) from error
        values = [v if c.place is None else output[c.place] for c, v in zip(carriers, values, strict=True)]
        for carrier, value in zip(carriers, values, strict=True):
            _check_only_tensors(carrier, value)
    for _ in range(len(traced.calls) - told + 1):
        yield [tensors_in(value) for value in values]


def _without_numbers(tensor: Tensor) -> Tensor:
    return tensor.to(META)


def _check_only_tensors(carrier: Carrier, value: Any) -> None:
    """Refuse a value that could not be built again from its tensors: a list that grows, a number, a gap."""
    parts = [value] if carrier.place is not None else list(value.values())
    for part in parts:
        whole = part is None and carrier.place is not None
        if not whole and not _only_tensors(part):
            raise untraceable(f'its blocks hand on "{carrier.name}", which holds more than tensors in tuples')


def _only_tensors(value: Any) -> bool:
    if type(value) is tuple:
        return bool(value) and all(map(_only_tensors, value))
    return isinstance(value, Tensor)


def _pieces(one: Mapping[Path, Tensor], two: Mapping[Path, Tensor], name: str) -> Iterator[CarriedTensor]:
    """How each tensor of a value is laid out, from it for two numbers of rows."""
    for path, few in one.items():
        many = two.get(path)
        grown = [] if many is None else [a for a in range(few.dim()) if few.shape[a] != many.shape[a]]
        if len(grown) != 1 or few.shape[grown[0]] != ROWS[0]:
            raise untraceable(f'its blocks hand on "{name}", in which rows cannot be told apart')
        axis = grown[0]
        yield CarriedTensor(path, (*few.shape[:axis], *few.shape[axis + 1 :]), axis, few.dtype)
