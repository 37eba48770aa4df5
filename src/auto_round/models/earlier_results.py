"""Finds models that read results of earlier blocks beside what flows from block to block.

Blocks are tuned one by one, with the arguments that a trace found. The stubs of that trace compute nothing,
so an argument that depends on the output of earlier blocks would hold what the stubs left there: a stack of
the states of all blocks so far, choices of tokens, a list that blocks fill. Such models are refused.

Two searches look for it, because each misses something. Gradients know what was computed from what, even
where weights are zero. Handing on other numbers also changes values that have no gradient, such as indices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.flow import BlockCall, States

_DEEPEST = 4
"""How far arguments are walked through: a mapping of lists of pairs in an object."""
_ROUNDINGS = 8
"""Rounding steps by which an addend may differ after it was added and subtracted again."""


@dataclass(frozen=True, slots=True)
class StubCall:
    """One call of a stub.

    Attributes:
        index: which block it stands for.
        received: what flowed in.
        handed: what it handed on.
        call: what else it was given.
        parameters: names of what the block takes, in order.
        beside: what it returned behind what flows, by place in its output.
    """

    index: int
    received: States
    handed: States
    call: BlockCall
    parameters: Sequence[str] = ()
    beside: Mapping[int, Any] = field(default_factory=dict)


def untraceable(reason: str) -> UnsupportedError:
    """The error that says why a model cannot be run block by block."""
    return UnsupportedError(
        "cannot run this model block by block",
        [
            Refusal(
                "models",
                reason,
                "use plain rounding, which runs no block: --recipe rtn, or iters=0 and disable_opt_rtn=True",
            )
        ],
    )


class Marks:
    """Random numbers that stubs hand on in place of what they were given; gradients lead back to them."""

    def __init__(self, seed: int) -> None:
        """Begin the sequence of numbers that belongs to a seed."""
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, states: States) -> States:
        """As many tensors of the same shapes, dtypes and devices."""
        return tuple(self._marked(state) for state in states)

    def _marked(self, state: Tensor) -> Tensor:
        if not state.is_floating_point():
            return state
        numbers = torch.rand(state.shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return (
            numbers.to(state.device, state.dtype).requires_grad_() + 0
        )  # a model may change what is not the first of its graph in place


@contextmanager
def gradients_from(module: nn.Module) -> Iterator[None]:
    """Let gradients lead to the parameters of a throw-away module for a while."""
    parameters = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def check_calls(first: Sequence[StubCall], second: Sequence[StubCall]) -> None:
    """Refuse a model whose blocks get other arguments when the stubs hand on other numbers.

    Args:
        first: calls of the stubs of one list, in order, while they handed on `Marks`.
        second: the same with other numbers.

    Raises:
        UnsupportedError: an argument of a block depends on earlier blocks.
    """
    if [passed.index for passed in first] != [passed.index for passed in second]:
        raise untraceable("which of its blocks run depends on what the blocks before them give")
    for one, other in zip(first, second, strict=True):
        for name, value in arguments(one.call, one.parameters):
            if _depends(value, dict(arguments(other.call, one.parameters)).get(name)):
                raise untraceable(
                    f'block {one.index} is given "{name}", which is computed from what earlier blocks hand on'
                )
    for (before, one), (was, other) in zip(pairwise(first), pairwise(second), strict=True):
        for handed, received, handed_then, received_then in zip(
            before.handed, one.received, was.handed, other.received, strict=True
        ):
            if not _same_addend(received, handed, received_then, handed_then):
                raise untraceable(
                    f"before block {one.index} the model computes with the hidden states, it does not only "
                    "add to them"
                )


def check_end(first: Tensor, second: Tensor) -> None:
    """Refuse a model that reads more at its end than what its last block hands on.

    Args:
        first: what came out, with gradients to the embedding and to what all blocks but the last handed on.
        second: the same for other tokens and other numbers; the last block handed on the same.

    Raises:
        UnsupportedError: what comes out depends on more than the output of the last block.
    """
    if _depends(first, second):
        raise untraceable("behind its last block the model reads more than what that block hands on")


def check_no_containers(calls: Sequence[BlockCall | None]) -> None:
    """Refuse empty containers that are handed to several blocks: blocks fill them for later blocks.

    Raises:
        UnsupportedError: there is one.
    """
    known: set[int] = set()
    for call in calls:
        own: set[int] = set()
        for name, value in () if call is None else arguments(call):
            for part in walk(value):
                if _waits_for_content(part):
                    if id(part) in known:
                        raise untraceable(f'its blocks hand on state to later blocks in "{name}"')
                    own.add(id(part))
        known |= own


def _waits_for_content(part: Any) -> bool:
    if isinstance(part, MutableMapping):
        return all(value is None for value in part.values())
    return isinstance(part, MutableSequence) and all(value is None for value in part)


def arguments(call: BlockCall, parameters: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Names and values of what a block is called with; positional ones get their names from `parameters`."""
    for position, value in enumerate(call.args):
        yield parameters[position] if position < len(parameters) else f"argument {position}", value
    yield from call.kwargs.items()


def walk(value: Any, deepest: int = _DEEPEST) -> Iterator[Any]:
    """A value and everything inside of it, without modules and functions."""
    yield value
    if deepest:
        for part in _parts(value):
            yield from walk(part, deepest - 1)


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        return ()
    return list(getattr(value, "__dict__", {}).values())


def _depends(one: Any, other: Any) -> bool:
    """Whether one of two values has gradients to the marks, or their tensors or numbers differ."""
    ones, others = ([part for part in walk(value) if _counts(part)] for value in (one, other))
    if len(ones) != len(others) or any(isinstance(part, Tensor) and part.requires_grad for part in ones):
        return True
    return not all(_equal(a, b) for a, b in zip(ones, others, strict=True))


def _counts(part: Any) -> bool:
    return isinstance(part, (Tensor, int, float))


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(type(one) is type(other) and one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _same_addend(received: Tensor, handed: Tensor, received_then: Tensor, handed_then: Tensor) -> bool:
    """Whether the same number was added to both marks (a model may add a constant between blocks)."""
    if torch.equal(received, handed) and torch.equal(received_then, handed_then):
        return True
    one, other = received.float() - handed.float(), received_then.float() - handed_then.float()
    largest = max(float(t.detach().abs().amax()) for t in (received, handed, received_then, handed_then))
    bound = _ROUNDINGS * torch.finfo(received.dtype).eps * largest
    return torch.allclose(one, other, rtol=0, atol=bound, equal_nan=True)
