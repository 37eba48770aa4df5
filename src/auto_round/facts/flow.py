"""What flows from block to block, and what else a block is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from auto_round.facts.carried import Carried

if TYPE_CHECKING:
    from torch import Tensor

States: TypeAlias = "tuple[Tensor, ...]"
"""What flows: one tensor of hidden states in a text model, several where a block changes several, each kept
as `[samples, length, width]` with a length and width of its own. The first is what the model goes on with
after its last block, and the one in which the positions of a row stand. Behind them stands what blocks hand
on beside it, if anything (`facts.carried`)."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Which parameters of a block receive what flows, and how the block hands it on.

    Attributes:
        taken: names of the parameters, in the order of `States`.
        returned: the same names in the order in which the block returns them.
        settled: how many values it returns right behind them in which nothing that flows has a part; every
            block finds them itself.
    """

    taken: tuple[str, ...]
    returned: tuple[str, ...]
    settled: int = 0

    @property
    def order(self) -> tuple[int, ...]:
        """Place of each of the `States` in the block's output."""
        return tuple(self.returned.index(name) for name in self.taken)


HIDDEN_STATES = Flow(("hidden_states",), ("hidden_states",))
"""What flows where nothing else is known: one tensor, alone or first in the block's output."""


@dataclass(frozen=True, slots=True)
class Axes:
    """How a model lays out a tensor that flows, where several hidden states of a token flow together.

    It is kept as `[rows, tokens, width]`, its other axes in one: hyper-connections (DeepSeek-V4) hand on
    `[rows, tokens, states, width]`, AltUp (Gemma 3n) `[states, rows, tokens, width]`.

    Attributes:
        rows: which axis counts rows.
        tokens: which axis counts tokens.
        others: sizes of the other axes, in order.
    """

    rows: int
    tokens: int
    others: tuple[int, ...]

    @classmethod
    def found(cls, one: tuple[int, ...], two: tuple[int, ...], counts: tuple[int, int]) -> Axes | None:
        """Axes of a tensor, from its shapes for other numbers of rows and tokens.

        Args:
            one: a shape.
            two: the shape for as many rows and tokens as `counts` says, both other than in `one`.
            counts: rows and tokens.

        Returns:
            None where these axes cannot be told, or where the tensor is `[rows, tokens, width]` as it is.
        """
        grown = [axis for axis, size in enumerate(two) if axis < len(one) and one[axis] != size]
        if len(one) != len(two) or sorted(two[axis] for axis in grown) != sorted(counts):
            return None
        rows, tokens = sorted(grown, key=lambda axis: counts.index(two[axis]))
        others = tuple(size for axis, size in enumerate(two) if axis not in grown)
        return None if (rows, tokens, len(others)) == (0, 1, 1) else cls(rows, tokens, others)

    def given(self, state: Tensor) -> Tensor:
        """A tensor as the model lays it out, from `[rows, tokens, width]`."""
        return state.reshape(*state.shape[:2], *self.others).movedim((0, 1), (self.rows, self.tokens))

    def kept(self, state: Tensor) -> Tensor:
        """A tensor as it is kept, `[rows, tokens, width]`."""
        return state.movedim((self.rows, self.tokens), (0, 1)).flatten(2)


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What one block is called with beside what flows.

    Caches are left out. A tensor whose first dimension is 1 in a batch of several rows is shared by all rows.

    Attributes:
        args: positional arguments; None where one of the `States` goes.
        kwargs: keyword arguments, for example `attention_mask` (None, or bool `[B, 1, L, L]`) and
            `position_embeddings` (a pair of `[1 or B, L, D]`).
        places: where each of the `States` goes: position in `args`, or name.
        lengths: how much of each of the `States` the block is given, where rows have other lengths than the
            tensors that hold them all; empty where it is given all of them.
        shape: of what flows in one row of an encoder, `[patches, width]` or `[tiles, patches, width]`: it is
            kept as `[1, length, width]`. None: it flows as it is kept.
        axes: of what flows in a language model; None where it flows as it is kept.
        carried: what blocks hand on beside what flows. Its pieces are kept behind the tensors that flow, as
            further `States`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    places: tuple[int | str, ...] = (0,)
    lengths: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None
    axes: Axes | None = None
    carried: tuple[Carried, ...] = ()

    def given(self, states: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the whole call."""
        args, kwargs = list(self.args), dict(self.kwargs)
        beside = states[len(self.places) :]
        for each in self.carried:
            kwargs[each.name] = each.given(beside[: len(each.pieces)])
            beside = beside[len(each.pieces) :]
        states = states[: len(self.places)]
        if self.shape is not None:
            states = [state.reshape(self.shape) for state in states]
        if self.axes is not None:
            states = [self.axes.given(state) for state in states]
        for place, state in zip(self.places, states, strict=True):
            if isinstance(place, int):
                args[place] = state
            else:
                kwargs[place] = state
        return tuple(args), kwargs

    def kept(self, states: Sequence[Tensor]) -> States:
        """What flows out of a block, as it is kept."""
        if self.axes is not None:
            return tuple(self.axes.kept(state) for state in states)
        if self.shape is None:
            return tuple(states)
        return tuple(state.reshape(1, -1, state.shape[-1]) for state in states)

    def carried_on(self, given: Mapping[str, Any], output: Any, states: Sequence[Tensor]) -> list[Tensor]:
        """What a block hands on beside what flows, as it is kept.

        Args:
            given: keyword arguments of the call.
            output: what the block returned.
            states: all that was given to it, as it is kept.
        """
        found: list[Tensor] = []
        for each in self.carried:
            first = len(self.places) + len(found)
            before = states[first : first + len(each.pieces)]
            found += each.handed(given[each.name], output, before)
        return found


def split_call(
    taken: Sequence[str], parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[States, BlockCall]:
    """Take what flows out of a block's arguments.

    Args:
        taken: names of the parameters that receive it.
        parameters: names of all parameters of the block, in order.
        args: positional arguments of a call.
        kwargs: keyword arguments of the call.

    Raises:
        LookupError: the call has no such argument.
    """
    rest, named = list(args), dict(kwargs)
    places: list[int | str] = []
    states = []
    for name in taken:
        position = parameters.index(name) if name in parameters else 0
        if name in named:
            places.append(name)
            states.append(named.pop(name))
        elif position < len(rest):
            places.append(position)
            states.append(rest[position])
            rest[position] = None
        else:
            raise LookupError(f'a block is called without its argument "{name}"')
    return tuple(states), BlockCall(tuple(rest), named, tuple(places))
