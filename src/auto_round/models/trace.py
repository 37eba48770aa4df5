"""Stub trace: run a model whose blocks only note what they are given, so no block is computed.

The stem is the model with every block replaced by a stub, which returns its input. One run of it shows what
each block receives besides the hidden states (masks, rotary embeddings, per-layer inputs), and what the model
adds between blocks. When the last stub returns given hidden states instead, the same run computes everything
after the blocks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import InternalError, UnsupportedError
from auto_round.facts.flow import BlockCall, Flow, States, split_call
from auto_round.facts.model import TOKENS
from auto_round.models.beside import (
    Marks,
    Passed,
    check_calls,
    check_end,
    check_no_containers,
    gradients_from,
    untraceable,
)
from auto_round.models.facts import shares_no_caches
from auto_round.models.families import parameter_names
from auto_round.models.roles import find_decoder, find_text_model
from auto_round.models.source import Edits, Trace

_CACHES = frozenset({"past_key_values", "past_key_value", "use_cache", "layer_past"})
# What a model may raise when a stub returns a tensor where a tuple was expected, or the reverse.
_WRONG_RETURN = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)


class Recorder:
    """What the stubs of one list of blocks saw and what they return.

    Attributes:
        returns_tuple: whether stubs wrap one tensor in a tuple, as their blocks do.
        ends: what the last stub hands on; None for a tensor that it hands on as it got it.
        marks: what all stubs hand on instead of their input; None for the input itself.
    """

    def __init__(self, flows: Sequence[Flow]) -> None:
        """Nothing seen yet.

        Args:
            flows: what each block takes and returns.
        """
        self.returns_tuple = False
        self.ends: Sequence[Tensor | None] = ()
        self.marks: Marks | None = None
        self._flows = flows
        self._seen: list[Passed] = []
        self._versions: list[int] = []

    @property
    def seen(self) -> tuple[Passed, ...]:
        """All calls since `start`, in order."""
        return tuple(self._seen)

    def start(self) -> None:
        """Forget the last run."""
        self._seen = []

    def receive(self, index: int, parameters: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The forward of stub `index`, whose parameters have these names."""
        flow = self._flows[index]
        kept = {key: value for key, value in kwargs.items() if key not in _CACHES}
        try:
            states, call = split_call(flow.taken, parameters, args, kept)
        except LookupError as error:
            raise untraceable(str(error)) from error
        for i, state in enumerate(states):
            if self._seen and state is self._seen[-1].handed[i] and state._version != self._versions[i]:
                raise untraceable(f"the model changes the hidden states in place before block {index}")
        handed = dict(zip(flow.taken, states if self.marks is None else self.marks(states), strict=True))
        if index == len(self._flows) - 1:
            known = zip(flow.taken, self.ends, strict=False)
            handed |= {name: end for name, end in known if end is not None}
        passed = tuple(handed.values())
        self._versions = [state._version for state in passed]
        self._seen.append(Passed(index, states, passed, call, parameters))
        output = tuple(handed[name] for name in flow.returned)
        return output if self.returns_tuple or len(output) > 1 else output[0]

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
            calls[passed.index] = passed.call
            pairs = zip(before, passed.received, strict=True)
            edits[passed.index] = tuple(_edit(a, b, passed.index) for a, b in pairs)
            before = passed.handed
        return Trace(states, tuple(calls), tuple(edits))


def _edit(before: Tensor, after: Tensor, index: int) -> Tensor | None:
    """What a model added to a tensor before block `index`."""
    if after is before or torch.equal(after, before):
        return None
    if after.shape != before.shape:
        raise untraceable(f"the hidden states change shape before block {index}")
    return after - before


def make_stubs(blocks: Sequence[nn.Module], recorder: Recorder) -> dict[int, nn.Module]:
    """`id` of each block -> its stub: a copy with the block's attributes whose forward is the recorder's."""
    stubs: dict[int, nn.Module] = {}
    for index, block in enumerate(blocks):
        stub = copy.deepcopy(block)
        stub.forward = functools.partial(recorder.receive, index, parameter_names(block))
        stubs[id(block)] = stub
    return stubs


@dataclass(frozen=True, slots=True)
class StemParts:
    """Models inside a model: all of it, but where it reads more than text.

    Attributes:
        decoder: turns token ids into hidden states.
        text_model: turns token ids into logits.
    """

    decoder: Any
    text_model: Any

    @classmethod
    def of(cls, model: Any, blocks: Sequence[str]) -> StemParts:
        """The smallest ones around blocks of these module paths."""
        paths = (find_decoder(model, blocks), find_text_model(model, blocks))
        return cls(*map(model.get_submodule, paths))


class StubStem:
    """A model whose blocks are stubs; satisfies `source.Stem`."""

    def __init__(
        self, model: Any, parts: StemParts, recorders: Sequence[Recorder], head: nn.Module | None
    ) -> None:
        """Find out what the blocks return.

        Args:
            model: real weights everywhere but in the blocks, which are stubs of `recorders`.
            parts: the models inside `model`.
            recorders: what the stubs of each list of blocks report to.
            head: the output head inside `model`; None when it has none.

        Raises:
            UnsupportedError: the model cannot be run block by block.
        """
        self._model = model
        self._decoder = parts.decoder
        self._text_model = parts.text_model
        self._recorders = recorders
        self._head = head
        self._device = next(p.device for p in model.get_input_embeddings().parameters())
        # Two rows of three tokens: any indexing into a tensor that should be a tuple changes the shape.
        probe = torch.zeros(2, 3, dtype=torch.int64, device=self._device)
        failure: Exception | None = None
        for wrapped in product((False, True), repeat=len(recorders)):
            for recorder, returns_tuple in zip(recorders, wrapped, strict=True):
                recorder.returns_tuple = returns_tuple
            try:
                self._probe(probe)
            except UnsupportedError:  # which is a RuntimeError too
                raise
            except _WRONG_RETURN as error:
                failure = error
            else:
                break
        else:
            raise untraceable(f"its blocks exchange more than hidden states ({failure})") from failure
        self._refuse_what_flows_beside(probe)

    def trace(self, inputs: Mapping[str, Tensor], ended: Sequence[States] = ()) -> Trace:
        """Inputs of every block of a list; see `source.Stem`."""
        with self._ending_in(dict(enumerate(ended))):
            self._run_decoder(inputs)
        traced = self._recorders[len(ended)].trace()
        first = traced.states[0]
        rows, last = inputs[TOKENS].shape, len(ended) + 1 == len(self._recorders)
        wrong = [s for s in traced.states if s.dim() != 3 or len(s) != rows[0]]
        if last and first.shape[:2] != rows:
            wrong.append(first)
        if wrong:
            raise untraceable(
                f"its hidden states have shape {list(wrong[0].shape)}, not [rows, tokens, width]"
            )
        if not shares_no_caches(self._model.config):
            check_no_containers(traced.calls)
        return traced

    def finish(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """Logits from the last block's output; see `source.Stem`."""
        if head is None:
            return self._run_model(hidden)
        inside = self._head_module()

        def with_other_weight(x: Tensor) -> Tensor:
            return nn.functional.linear(x, head, inside.bias)

        with _forward_replaced(inside, with_other_weight):
            return self._run_model(hidden)

    @contextmanager
    def embedding(self, weight: Tensor) -> Iterator[None]:
        """Another token embedding for a while; see `source.Stem`."""
        table = self._model.get_input_embeddings()
        own = table.weight
        table.weight = nn.Parameter(weight.to(own.device, own.dtype), requires_grad=False)
        try:
            yield
        finally:
            table.weight = own

    def finish_inputs(self, hidden: Tensor) -> Tensor:
        """Input of the head layer; see `source.Stem`."""
        seen: list[Tensor] = []

        def note(x: Tensor) -> Tensor:
            seen.append(x)
            return x[..., :1]

        with _forward_replaced(self._head_module(), note):
            self._run_model(hidden)
        return seen[0]

    def _head_module(self) -> Any:
        if self._head is None:
            raise InternalError("this stem was made without the model's head")
        return self._head

    def _run_model(self, hidden: Tensor) -> Tensor:
        """Logits of the model whose last block gives `hidden`."""
        with self._ending_in({len(self._recorders) - 1: (hidden,)}):
            logits: Tensor = self._text_model(**{TOKENS: self._blank(hidden)}, use_cache=False).logits
        return logits

    def _probe(self, input_ids: Tensor) -> None:
        output = self._run_decoder({TOKENS: input_ids}).last_hidden_state
        if output.shape[:-1] != input_ids.shape:
            raise ValueError(f"hidden states of shape {list(output.shape)} came out")
        for recorder in self._recorders:
            recorder.trace()

    def _refuse_what_flows_beside(self, probe: Tensor) -> None:
        """Refuse a model whose blocks, or whose end, read more of earlier blocks than what flows."""
        self._run_decoder({TOKENS: probe})
        ended = [recorder.trace().states for recorder in self._recorders]
        for number, recorder in enumerate(self._recorders):
            seen = []
            for seed in range(2):
                with self._ending_in(dict(enumerate(ended[:number]))), _marking([recorder], seed):
                    self._run_decoder({TOKENS: probe}, gradients=True)
                seen.append(recorder.seen)
            check_calls(*seen)
        outputs = []
        end = {len(ended) - 1: tuple(torch.ones_like(state) for state in ended[-1][:1])}
        for seed in range(2):
            with (
                self._ending_in(end),
                _marking(self._recorders, seed),
                gradients_from(self._model.get_input_embeddings()),
            ):
                outputs.append(self._run_decoder({TOKENS: probe + seed}, gradients=True).last_hidden_state)
        check_end(*outputs)

    def _run_decoder(self, inputs: Mapping[str, Tensor], *, gradients: bool = False) -> Any:
        self._start()
        given = {name: value.to(self._device) for name, value in inputs.items()}
        with torch.set_grad_enabled(gradients):
            return self._decoder(**given, use_cache=False)

    def _blank(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self._device)

    def _start(self) -> None:
        for recorder in self._recorders:
            recorder.start()

    @contextmanager
    def _ending_in(self, ends: Mapping[int, Sequence[Tensor]]) -> Iterator[None]:
        """Let the last stubs of some lists hand on given tensors."""
        self._start()
        for number, states in ends.items():
            self._recorders[number].ends = states
        try:
            yield
        finally:
            for number in ends:
                self._recorders[number].ends = ()


@contextmanager
def _marking(recorders: Sequence[Recorder], seed: int) -> Iterator[None]:
    """Let the stubs of some lists hand on `Marks` for a while."""
    for recorder in recorders:
        recorder.marks = Marks(seed)
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.marks = None


@contextmanager
def _forward_replaced(module: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module of a throw-away copy compute something else for a while."""
    original = module.forward
    module.forward = forward
    try:
        yield
    finally:
        module.forward = original
