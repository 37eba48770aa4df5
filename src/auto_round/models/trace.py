"""Stub trace: run a model whose blocks only note what they are given, so no block is computed.

The stem is the model with every block replaced by a stub, which returns its input. One run of it shows what
each block receives besides the hidden states (masks, rotary embeddings, per-layer inputs), and what the model
adds between blocks. When the last stub returns given hidden states instead, the same run computes everything
after the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import InternalError, UnsupportedError
from auto_round.facts.carried import Carried
from auto_round.facts.flow import Axes, States
from auto_round.facts.model import MASK, TOKENS
from auto_round.models.config_facts import shares_no_caches
from auto_round.models.earlier_results import (
    Marks,
    check_calls,
    check_end,
    check_no_containers,
    gradients_from,
    untraceable,
)
from auto_round.models.families import parameter_names
from auto_round.models.find_carried import Weightless, find_carriers, look_at_carried
from auto_round.models.recorder import Recorder
from auto_round.models.roles import find_decoder, find_text_model
from auto_round.models.source import Trace

# What a model may raise when a stub returns a tensor where a tuple was expected, or the reverse.
_WRONG_RETURN = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)

_PROBES = (2, 3), (5, 7)
"""Rows and tokens by which axes are told: no two numbers alike."""

_RETURNED = (0, 1, 2, 3)
"""How many values a block may return in a tuple; 0 for a bare tensor."""


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
        self,
        model: Any,
        parts: StemParts,
        recorders: Sequence[Recorder],
        head: nn.Module | None,
        weightless: Sequence[Weightless] = (),
    ) -> None:
        """Find out what the blocks return, and what they hand on.

        Args:
            model: real weights everywhere but in the blocks, which are stubs of `recorders`.
            parts: the models inside `model`.
            recorders: what the stubs of each list of blocks report to.
            head: the output head inside `model`; None when it has none.
            weightless: the blocks of each list without weights, for what they hand on beside hidden states;
                empty where nobody traces.

        Raises:
            UnsupportedError: the model cannot be run block by block.
        """
        self._model = model
        self._weightless = weightless
        self._looked: dict[tuple[int, int], list[tuple[Carried, ...]]] = {}
        self._decoder = parts.decoder
        self._text_model = parts.text_model
        self._recorders = recorders
        self._head = head
        self._device = next(p.device for p in model.get_input_embeddings().parameters())
        # Two rows of three tokens: any indexing into a tensor that should be a tuple changes the shape.
        probe = self._tokens((2, 3))
        failure: Exception | None = None
        for numbers in product(_RETURNED, repeat=len(recorders)):
            for recorder, returned in zip(recorders, numbers, strict=True):
                recorder.returned = returned
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
        self._find_axes()
        if weightless:
            self._find_carriers(probe)
        self._refuse_what_flows_beside(probe)

    @property
    def model(self) -> nn.Module:
        """See `source.Stem`."""
        module: nn.Module = self._model
        return module

    def trace(self, inputs: Mapping[str, Tensor], ended: Sequence[States] = ()) -> Trace:
        """Inputs of every block of a list; see `source.Stem`."""
        recorder = self._recorders[len(ended)]
        self._look_at_carried(len(ended), inputs[TOKENS].shape[1])
        with self._ending_in(dict(enumerate(ended))):
            self._run(inputs)
            traced = recorder.trace()
            if any(edit is not None for edits in traced.edits for edit in edits):
                with _marking([recorder], _nothing):
                    self._run(inputs)
                traced = replace(traced, edits=recorder.trace().edits)
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

    def refuse_what_flows_beside(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse a model whose blocks read more of earlier blocks than what flows, for some inputs.

        Raises:
            UnsupportedError: they do.
        """
        self._run(inputs)
        ended = [recorder.trace().states for recorder in self._recorders]
        for number, recorder in enumerate(self._recorders):
            seen = []
            for seed in range(2):
                with self._ending_in(dict(enumerate(ended[:number]))), _marking([recorder], Marks(seed)):
                    self._run(inputs, gradients=True)
                seen.append(recorder.seen)
            check_calls(*seen)

    def refuse_more_at_the_end(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse a model that changes what its last block hands on, where there are images.

        Raises:
            UnsupportedError: it does.
        """
        if self._suffices(inputs):
            return
        self._run(inputs)
        marks = Marks(0)(self._recorders[-1].trace().states[:1])
        with self._ending_in({len(self._recorders) - 1: marks}):
            found = self._run(inputs).logits
        if not torch.allclose(found.float(), self._run_model(marks[0]).float(), equal_nan=True):
            raise untraceable("with images it computes more behind its last block than with text alone")

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
        output = self._run({TOKENS: input_ids}).last_hidden_state
        if output.shape[:-1] != input_ids.shape:
            raise ValueError(f"hidden states of shape {list(output.shape)} came out")
        for recorder in self._recorders:
            recorder.trace()

    def _tokens(self, counts: tuple[int, int]) -> Tensor:
        return torch.zeros(counts, dtype=torch.int64, device=self._device)

    def _find_axes(self) -> None:
        """Find out how what flows is laid out."""
        shapes = []
        for counts in _PROBES:
            self._run({TOKENS: self._tokens(counts)})
            shapes.append([tuple(recorder.seen[0].received[0].shape) for recorder in self._recorders])
        for recorder, one, two in zip(self._recorders, *shapes, strict=True):
            recorder.axes = Axes.found(one, two, _PROBES[-1])

    def _find_carriers(self, probe: Tensor) -> None:
        """Find out which values blocks hand on beside what flows."""
        if shares_no_caches(self._model.config):
            return
        with _marking(self._recorders, Marks(0)):
            self._run({TOKENS: probe}, gradients=True)
        for recorder in self._recorders:
            recorder.carriers = find_carriers(recorder.seen)

    def _look_at_carried(self, number: int, length: int) -> None:
        """Find out what blocks hand on in rows of a length."""
        recorder = self._recorders[number]
        if not recorder.carriers:
            return
        if (number, length) not in self._looked:

            def traced(rows: int, tokens: int) -> Trace:
                recorder.carried = ()
                self._run({TOKENS: self._tokens((rows, tokens))})
                return recorder.trace()

            blocks = self._weightless[number]
            found = look_at_carried(recorder.carriers, traced, length, blocks)
            self._looked[number, length] = found
            self._refuse_what_reads_mappings(recorder, found[0], length)
        recorder.carried = self._looked[number, length]

    def _refuse_what_reads_mappings(
        self, recorder: Recorder, carried: Sequence[Carried], length: int
    ) -> None:
        """Refuse a model that itself reads what its blocks put into a mapping."""
        filled = [replace(each, present=each.paths) for each in carried if each.empty is not None]
        if not any(each.pieces for each in filled):
            return
        tokens = self._tokens((1, length))
        seen, outputs = [], []
        for seed in range(2):
            marks, one = Marks(seed), torch.zeros(1, 1, 1, dtype=torch.float32, device=self._device)
            content = {c.name: c.given(marks(tuple(piece.room(one) for piece in c.pieces))) for c in filled}
            with _filling(recorder, content):
                outputs.append(self._run({TOKENS: tokens}, gradients=True).last_hidden_state)
            seen.append(recorder.seen)
        check_calls(*seen)
        check_end(*outputs)

    def _refuse_what_flows_beside(self, probe: Tensor) -> None:
        """Refuse a model whose blocks, or whose end, read more of earlier blocks than what flows."""
        self.refuse_what_flows_beside({TOKENS: probe})
        ended = [recorder.trace().states for recorder in self._recorders]
        outputs = []
        end = {len(ended) - 1: tuple(torch.ones_like(state) for state in ended[-1][:1])}
        for seed in range(2):
            with (
                self._ending_in(end),
                _marking(self._recorders, Marks(seed)),
                gradients_from(self._model.get_input_embeddings()),
            ):
                outputs.append(self._run({TOKENS: probe + seed}, gradients=True).last_hidden_state)
        check_end(*outputs)

    def _run(self, inputs: Mapping[str, Tensor], *, gradients: bool = False) -> Any:
        """Output of the decoder; of the whole model where it is given more than the decoder takes."""
        self._start()
        dtype = self._model.get_input_embeddings().weight.dtype
        given = {n: v.to(self._device, dtype if v.is_floating_point() else None) for n, v in inputs.items()}
        runs = self._decoder if self._suffices(inputs) else self._model
        with torch.set_grad_enabled(gradients):
            return runs(**given, use_cache=False)

    def _suffices(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the decoder takes all inputs."""
        return inputs.keys() <= {TOKENS, MASK, *parameter_names(self._decoder)}

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


class LeftOut(nn.Module):
    """Stands in for the head where nobody looks at logits, and for encoders where there is only text."""

    def forward(self, x: Tensor) -> Tensor:
        """The first column, in place of a head's many."""
        return x[..., :1]


@contextmanager
def _marking(recorders: Sequence[Recorder], marks: Callable[[States], States]) -> Iterator[None]:
    """Let the stubs of some lists hand on other numbers for a while."""
    for recorder in recorders:
        recorder.marks = marks
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.marks = None


@contextmanager
def _filling(recorder: Recorder, content: Mapping[str, Mapping[Any, Any]]) -> Iterator[None]:
    """Let the stubs of a list put something into the mappings that its blocks fill, for a while."""
    recorder.filling = content
    try:
        yield
    finally:
        recorder.filling = {}


def _nothing(states: States) -> States:
    """Zeros, to which a model adds exactly what it adds: beside other numbers its last bits get lost."""
    return tuple(torch.zeros_like(state) for state in states)


@contextmanager
def _forward_replaced(module: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module of a throw-away copy compute something else for a while."""
    original = module.forward
    module.forward = forward
    try:
        yield
    finally:
        module.forward = original
