"""Recording: a pipeline draws captions, and the arguments of its components are kept at chosen steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.diffusion.drawing import Drawing
from auto_round.diffusion.rows import RowWriter
from auto_round.errors import UnsupportedError

_TIMES = ("timestep", "t")
"""What components call the time of a denoising step."""

_ANSWERS = frozenset(
    {"return_dict", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
)
"""Arguments that say what comes back."""

_WHOLE = frozenset({"img_ids", "txt_ids"})
"""Arguments that all pictures of a call share, whatever their first dimension."""

_GOLDEN = 0.6180339887498949

APART = 1 << 20
"""Captions of calibration are numbered from here: pictures to compare begin with noise that was not seen."""


def kept_steps(caption: int, total: int, kept: int) -> frozenset[int]:
    """Steps of a caption that are kept, one in each of `kept` equal parts of the way.

    Where in its part a step lies moves on from caption to caption by the golden ratio, so that few captions
    cover all steps evenly.

    Args:
        caption: its number.
        total: denoising steps of a picture.
        kept: how many are kept; 0 for all.
    """
    if not kept or kept >= total:
        return frozenset(range(total))
    offset = (caption * _GOLDEN) % 1.0
    return frozenset(int((part + offset) * total / kept) for part in range(kept))


@dataclass(slots=True)
class PipelineRecorder:
    """What the components of a pipeline are called with while it draws some captions.

    Attributes:
        first: number of the first of these captions.
        count: how many are drawn at once.
        total: denoising steps of a picture.
        kept: steps kept of each.
    """

    first: int
    count: int
    total: int
    kept: int
    _step: int = -1
    _time: float | None = None

    def note(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, writer: RowWriter
    ) -> None:
        """Keep a call, cut into rows. One that is told no time reads captions, and is kept in any case.

        Raises:
            UnsupportedError: it is not made of whole pictures.
        """
        inputs = _by_name(module, args, kwargs)
        time, chosen, step = _time_of(inputs), list(range(self.count)), 0
        if time is not None:
            if time != self._time:
                self._step, self._time = self._step + 1, time
            step = self._step
            chosen = [i for i in chosen if step in kept_steps(self.first + i, self.total, self.kept)]
        batch = _batch(inputs)
        if batch % self.count:
            raise UnsupportedError(
                f"the pipeline calls its {type(module).__name__} with {batch} pictures for {self.count} "
                "captions, expected a multiple"
            )
        for row in range(batch):  # with guidance there are two of each: without and with its caption
            if row % self.count in chosen:
                cut = {n: v if n in _WHOLE else one_row(v, row, batch) for n, v in inputs.items()}
                writer.add(self.first + row % self.count, step, time or 0.0, cut)


class _Enough(Exception):  # noqa: N818  nothing went wrong
    """Captions are read, and nothing behind that is asked for."""


def record(
    drawing: Drawing,
    captions: Sequence[str],
    components: Mapping[str, nn.Module],
    writers: Mapping[str, RowWriter],
    kept: int,
    *,
    until: Sequence[nn.Module] = (),
) -> Iterator[int]:
    """Draw captions, some at a time, and write rows; yields how many captions are done.

    Args:
        drawing: the pipeline in memory, and how it draws.
        captions: what it draws.
        components: those whose calls are kept.
        writers: where the rows of each go.
        kept: steps kept of each caption; 0 for all.
        until: the first call of one of these ends the drawing.
    """
    for first in range(0, len(captions), drawing.at_once):
        some = captions[first : first + drawing.at_once]
        recorder = PipelineRecorder(first, len(some), drawing.steps, kept)
        with ExitStack() as stack:
            stack.enter_context(suppress(_Enough))
            for name, module in components.items():
                stack.enter_context(_called(module, partial(recorder.note, writer=writers[name])))
            for module in until:
                stack.enter_context(_called(module, _enough))
            drawing.latents(some, APART + first)
        yield first + len(some)


@contextmanager
def _called(module: nn.Module, note: Callable[..., None]) -> Iterator[None]:
    """Let `note` know of every call of a module, before it."""
    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _enough(*_: Any) -> None:
    raise _Enough


def _by_name(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by the names of the module's parameters, without what says what comes back."""
    signature = inspect.signature(module.forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return {name: value for name, value in bound.items() if name not in _ANSWERS}


def _time_of(inputs: Mapping[str, Any]) -> float | None:
    """What a call is told of the time; None for a text encoder, which is told nothing."""
    value = next((inputs[name] for name in _TIMES if name in inputs), None)
    if isinstance(value, Tensor):
        return float(value.reshape(-1)[0])
    return float(value) if isinstance(value, int | float) else None


def _batch(inputs: Mapping[str, Any]) -> int:
    """Pictures in a call: the length of its first argument."""
    return len(next(iter(inputs.values())))


def one_row(value: Any, row: int, batch: int) -> Any:
    """One picture of an argument, as in a batch of one.

    Args:
        value: tensors `[batch, ...]`, lists of one entry a picture, mappings of such; others are shared.
        row: which picture.
        batch: how many there are.
    """
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.dim() and value.shape[0] == batch else value
    if isinstance(value, list) and len(value) == batch:
        return value[row : row + 1]
    if isinstance(value, Mapping):
        return {name: one_row(part, row, batch) for name, part in value.items()}
    return value


def joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows put into one call again."""
    return {
        name: first if name in _WHOLE else _join([row[name] for row in rows])
        for name, first in rows[0].items()
    }


def _join(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values)) if first.dim() and first.shape[0] == 1 else first
    if isinstance(first, list):
        return [part for value in values for part in value]
    if isinstance(first, Mapping):
        return {name: _join([value[name] for value in values]) for name in first}
    return first
