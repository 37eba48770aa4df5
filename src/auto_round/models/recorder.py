"""Stubs in place of the blocks of one list: they note what they are given and hand on their own input."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.facts.carried import Carried
from auto_round.facts.flow import Axes, BlockCall, Flow, States, split_call
from auto_round.models.earlier_results import StubCall, untraceable
from auto_round.models.families import parameter_names
from auto_round.models.find_carried import Carrier
from auto_round.models.source import Edits, Trace

_CACHES = frozenset({"past_key_values", "past_key_value", "cache", "use_cache", "layer_past"})


class Recorder:
    """What the stubs of one list of blocks saw and what they return.

    Attributes:
        returned: how many values stubs return in a tuple, as their blocks do, what flows first; 0 for a bare
            tensor.
        ends: what the last stub hands on, as it is kept; None for a tensor that it hands on as it got it.
        marks: what all stubs hand on instead of their input; None for the input itself.
        axes: of what flows; None where it flows as it is kept.
        carriers: values that blocks hand on beside what flows; calls do not have them.
        carried: what each block is given of them; empty where that is not known yet.
        filling: what stubs put into the mappings that blocks fill, by the name of the parameter.
    """

    def __init__(self, flows: Sequence[Flow]) -> None:
        """Nothing seen yet.

        Args:
            flows: what each block takes and returns.
        """
        self.returned = 0
        self.ends: Sequence[Tensor | None] = ()
        self.marks: Callable[[States], States] | None = None
        self.axes: Axes | None = None
        self.carriers: Sequence[Carrier] = ()
        self.carried: Sequence[tuple[Carried, ...]] = ()
        self.filling: Mapping[str, Mapping[Any, Any]] = {}
        self._flows = flows
        self._seen: list[StubCall] = []
        self._versions: list[int] = []

    @property
    def seen(self) -> tuple[StubCall, ...]:
        """All calls since `start`, in order."""
        return tuple(self._seen)

    def start(self) -> None:
        """Forget the last run."""
        self._seen = []

    def receive(self, index: int, parameters: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The forward of stub `index`, whose parameters have these names."""
        flow = self._flows[index]
        carried = {carrier.name for carrier in self.carriers}
        args, kwargs = _by_name(args, kwargs, parameters, carried)
        for name, content in self.filling.items():
            kwargs[name].update(content)
        kept = {key: value for key, value in kwargs.items() if key not in _CACHES | carried}
        try:
            states, call = split_call(flow.taken, parameters, args, kept)
        except LookupError as error:
            raise untraceable(str(error)) from error
        for i, state in enumerate(states):
            if not isinstance(state, Tensor):
                raise TypeError(f"block {index} is given a {type(state).__name__} in place of hidden states")
            if self._seen and state is self._seen[-1].handed[i] and state._version != self._versions[i]:
                raise untraceable(f"the model changes the hidden states in place before block {index}")
        handed = dict(zip(flow.taken, states if self.marks is None else self.marks(states), strict=True))
        if index == len(self._flows) - 1:
            known = zip(flow.taken, self.ends, strict=False)
            handed |= {name: self._laid_out(end) for name, end in known if end is not None}
        passed = tuple(handed.values())
        self._versions = [state._version for state in passed]
        output = tuple(handed[name] for name in flow.returned)
        first = len(output) + flow.settled
        beside = {place: self._beside() for place in range(first, self.returned)}
        self._seen.append(StubCall(index, states, passed, call, parameters, beside))
        if self.returned > len(output):
            return (*output, *(None,) * flow.settled, *beside.values())
        return output if self.returned or len(output) > 1 else output[0]

    def _laid_out(self, state: Tensor) -> Tensor:
        return state if self.axes is None else self.axes.given(state)

    def _kept(self, states: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        if self.axes is None:
            return tuple(states)
        return tuple(None if state is None else self.axes.kept(state) for state in states)

    def _beside(self) -> Tensor | None:
        """What stubs return beside what flows, attention weights say: a number with a gradient, if marked.

        Where it comes to a later block, or to the end of the model, the gradient tells.
        """
        if self.marks is None:
            return None
        return torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True) + 0

    def trace(self) -> Trace:
        """What the stubs saw since `start`.

        Raises:
            UnsupportedError: blocks ran in another order than they stand in, or hand on hidden state.
        """
        order = [passed.index for passed in self._seen]
        if not order or order != sorted(set(order)):
            raise untraceable(f"its blocks run in the order {order}, not one after another")
        calls: list[BlockCall | None] = [None] * len(self._flows)
        states = before = self._seen[0].received
        edits: list[Edits] = [(None,) * len(states)] * len(self._flows)
        for passed in self._seen:
            beside = self.carried[passed.index] if self.carried else ()
            calls[passed.index] = replace(passed.call, axes=self.axes, carried=beside)
            pairs = zip(before, passed.received, strict=True)
            edits[passed.index] = self._kept([_edit(a, b, passed.index) for a, b in pairs])
            before = passed.handed
        kept = states if self.axes is None else tuple(map(self.axes.kept, states))
        return Trace((*kept, *self._nothing_carried(kept[0])), tuple(calls), tuple(edits), len(kept))

    def _nothing_carried(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Room for what blocks hand on beside what flows, before the first of them."""
        pieces = [piece for each in (self.carried or [()])[0] for piece in each.pieces]
        return tuple(piece.room(hidden) for piece in pieces)


def _by_name(
    args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Sequence[str], wanted: Collection[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call, those from the first of some parameters on by their names."""
    first = next((i for i, name in enumerate(parameters[: len(args)]) if name in wanted), len(args))
    return args[:first], {**dict(zip(parameters[first:], args[first:], strict=False)), **kwargs}


def _edit(before: Tensor, after: Tensor, index: int) -> Tensor | None:
    """What a model added to a tensor before block `index`."""
    if after is before or torch.equal(after, before):
        return None
    if after.shape != before.shape:
        raise untraceable(f"the hidden states change shape before block {index}")
    return after - before


def make_stubs(blocks: Sequence[nn.Module], receive: Callable[..., Any]) -> dict[int, nn.Module]:
    """`id` of each block -> its stub: a copy with the block's attributes that hands its calls on.

    Args:
        blocks: of one list.
        receive: called with the block's index, the names of its parameters, and the call's arguments, as
            `Recorder.receive` is.
    """
    stubs: dict[int, nn.Module] = {}
    for index, block in enumerate(blocks):
        stub = copy.deepcopy(block)
        stub.forward = functools.partial(receive, index, parameter_names(block))
        stubs[id(block)] = stub
    return stubs
