"""Sensitivity by the Fisher information: what rounding changes, weighed by squared gradients of predictions.

To second order the divergence of a model's predictions from its own is half the mean square of (gradient of
the log-probability of a token drawn from the prediction) x (change). Tokens are drawn at every position
independently, so the gradients of a whole row add up without mixing: one pass backward through a block gives
the slopes along all its weights, and each option costs no more than a product of numbers with them. Gradients
flow back block by block, and each block is read once forward and once backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from auto_round.autoscheme.by_divergence import divergences
from auto_round.autoscheme.outside import begin_rounded
from auto_round.autoscheme.parts import (
    OpenBlock,
    Part,
    RoundedLayers,
    ScoringSetting,
    Trial,
    WatchedFormat,
    open_block,
    taken,
)
from auto_round.autoscheme.start import begin
from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.evaluate.logits import positions_at_once
from auto_round.facts.flow import States
from auto_round.models.source import CPU
from auto_round.numerics.activation import ActivationFormat
from auto_round.pipeline.machine.memory import release_freed_memory
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.streams import home_of_streams, room_like
from auto_round.tuning.samples import leaf

TOGETHER = 4
"""Rows whose slopes are added before they are squared, whatever runs at a time: fewer products, and signs of
independent draws cancel what the sum would mix."""

LOGITS_BYTES = 128 << 20
"""Memory for logits and what becomes of them; the head is read once for as many positions as fit."""

CHANGE = torch.bfloat16
"""Holds what rounding changes in a weight: errors of 8 bits average out over a row of weights."""

CHANGES_BYTES = 2 << 30
"""Memory for what the options change in a block; one with more is run back several times."""

BEFORE_BLOCKS = -1
"""Place of the embedding."""

SAVED = "gradients.safetensors"
"""File of the gradient behind the block that is next."""


def measure(
    setting: ScoringSetting, parts: Sequence[Part], scratch: Path
) -> Iterator[tuple[Part, list[float]]]:
    """Estimate of the mean KL when one part is rounded, nats per token, for each option.

    Args:
        setting: what is measured, and on what.
        parts: parts to measure.
        scratch: folder for what does not fit into memory, and for gradients from which a killed run goes on.

    Yields:
        Each part with its scores: the head's, block by block from the last to the first, the embedding's.

    Raises:
        NumericsError: a weight is not finite.
    """
    job = setting.job
    table, start, masks = begin(setting, scratch)
    boundaries = _forward(setting, table, start, scratch)
    heads = [part for part in parts if setting.at_the_head(part)]
    scores = divergences(setting, boundaries[-1], {}, heads) if heads else {}
    embedding = next((part for part in parts if part.layers[0] == setting.embedding), None)
    for part in heads:
        if part != embedding:
            yield part, [scores.get((part, option), 0.0) for option in setting.options]
    wanted = [part.block for part in parts if part.block is not None]
    if embedding is not None:
        wanted.append(BEFORE_BLOCKS)
    if not wanted:
        return
    saved = _load(scratch / SAVED, len(start))
    if saved is None or saved[0] <= max(wanted):
        saved = len(job.source.blocks), _at_the_end(setting, boundaries[-1], masks)
    behind, gradient = saved
    tokens = start[0].shape[0] * start[0].shape[1] if masks is None else int(masks.sum())
    for index in range(behind - 1, max(0, min(wanted)) - 1, -1):
        del boundaries[index + 1 :]
        mine = [part for part in parts if part.block == index]
        with open_block(setting, index, table, mine) as opened:
            sums = _back(opened, mine, boundaries[index], gradient, masks)
        for part in mine:
            yield part, [sums.get((part, o), 0.0) / (2 * tokens) for o in setting.options]
        _save(scratch / SAVED, index, gradient)
    if embedding is not None:
        squares = _of_embedding(setting, embedding, start, gradient)
        at_head = [scores.get((embedding, option), 0.0) for option in setting.options]
        yield embedding, [s / (2 * tokens) + h for s, h in zip(squares, at_head, strict=True)]


def _of_embedding(setting: ScoringSetting, part: Part, start: States, gradient: States) -> list[float]:
    """Sum of (slope x change)^2 over tokens for each option, of what flows into the first block."""
    sums = []
    for option in setting.options:
        kept = setting.keeps(part, option)
        moved = start if kept else begin_rounded(setting, part, option, start)
        sums.append(sum(_squares(g, m - s) for g, m, s in zip(gradient, moved, start, strict=True)))
    return sums


def _forward(setting: ScoringSetting, table: ArgumentTable, start: States, scratch: Path) -> list[States]:
    """What flows into each block, and out of the last."""
    job = setting.job
    count = len(job.source.blocks) + 1
    nbytes = count * sum(state.numel() * state.element_size() for state in start)
    home = home_of_streams(job.level, job.memory, job.device, nbytes)
    spill = scratch / "boundaries"
    boundaries = [start]
    for block in job.source.blocks:
        out = room_like(start, str(block.index), home, spill)
        with open_block(setting, block.index, table, []) as opened:
            opened.pass_on(boundaries[-1], out)
        boundaries.append(out)
    return boundaries


def _at_the_end(setting: ScoringSetting, final: States, masks: Tensor | None) -> States:
    """Gradient of the drawn tokens' log-probability with respect to what flows out of the last block.

    Draws are made row by row from a generator of their own, so they do not depend on what runs together.
    """
    job = setting.job
    seed = job.options.calibration.seed
    gradient = tuple(torch.zeros_like(state) for state in final)
    length = final[0].shape[1]
    pieces = math.ceil(length / positions_at_once(job.source.facts.vocabulary, LOGITS_BYTES))
    step = math.ceil(length / pieces)
    with job.source.stem(job.device, job.dtype) as stem:
        for row in range(final[0].shape[0]):
            draws = torch.Generator(device=CPU).manual_seed(seed + row)
            uniform = torch.rand(length, generator=draws, dtype=torch.float64, device=CPU)
            for begin_at in range(0, length, step):
                here = (slice(row, row + 1), slice(begin_at, begin_at + step))
                hidden = final[0][here].to(job.device).requires_grad_()
                with torch.enable_grad():
                    likely = stem.finish(hidden)[0].float().log_softmax(-1)
                tokens = _draw(likely.detach(), uniform[here[1]].to(likely.device))
                slope = torch.ones(len(tokens), 1, dtype=likely.dtype, device=likely.device)
                if masks is not None:
                    slope *= masks[row, here[1], None].to(slope.device)
                (found,) = torch.autograd.grad(likely.gather(-1, tokens), hidden, slope)
                gradient[0][here] = found.to(gradient[0].device)
    return gradient


def _draw(likely: Tensor, uniform: Tensor) -> Tensor:
    """Tokens `[length, 1]` drawn from log-probabilities `[length, vocabulary]` by numbers in [0, 1)."""
    below = likely.double().exp_().cumsum_(-1)
    wanted = uniform.unsqueeze(-1) * below[:, -1:]
    return torch.searchsorted(below, wanted, right=True).clamp_max(likely.shape[-1] - 1)


def _back(
    opened: OpenBlock, parts: Sequence[Part], inputs: States, gradient: States, masks: Tensor | None
) -> dict[Trial, float]:
    """Sum of (slope x change)^2 for each part and option that rounds it.

    Args:
        opened: the block.
        parts: parts of it.
        inputs: what flows into it.
        gradient: with respect to what flows out of it; then with respect to what flows in.
        masks: which positions count.
    """
    setting, device = opened.setting, opened.setting.job.device
    trials = [(part, o) for part in parts for o in setting.options if not setting.keeps(part, o)]
    if trials:
        opened.observe(inputs, parts, masks)
    sums: dict[Trial, float] = {}
    turns = _turns(setting, trials)
    for number, turn in enumerate(turns):
        slopes = _Slopes(opened, turn)
        for rows, last in _some_rows(inputs[0].shape[0], setting.batch_size):
            states = tuple(leaf(s.to(device)) for s in taken(inputs, rows))
            slopes.add(states, taken(gradient, rows), rows, last=last)
            if number + 1 == len(turns):
                for to, state in zip(gradient, states, strict=True):
                    to[rows.start : rows.stop] = 0 if state.grad is None else state.grad.to(to.device)
        sums |= slopes.sums
    return sums


def _turns(setting: ScoringSetting, trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials whose changes are held at a time; at least one turn, in which the gradient moves."""
    turns: list[list[Trial]] = [[]]
    room = CHANGES_BYTES
    for part, option in trials:
        weights = sum(setting.candidates.layers[name].weights for name in part.layers)
        room -= weights * CHANGE.itemsize
        if room < 0 and turns[-1]:
            turns.append([])
            room = CHANGES_BYTES - weights * CHANGE.itemsize
        turns[-1].append((part, option))
    return turns


def _some_rows(count: int, batch_size: int) -> Iterator[tuple[range, bool]]:
    """Rows that run at a time, and whether they are the last of those that are added before squaring."""
    for first in range(0, count, TOGETHER):
        end = min(first + TOGETHER, count)
        for at in range(first, end, batch_size):
            stop = min(at + batch_size, end)
            yield range(at, stop), stop == end


class _Slopes:
    """Slopes of a block's weights and inputs, and the squares of what roundings change along them.

    Channels of a layer's output count apart: what they change is summed over rows that run together, then
    squared. Of inputs the channels of a token are added, and tokens count apart.

    Attributes:
        sums: of squares, by trial.
    """

    def __init__(self, opened: OpenBlock, trials: Sequence[Trial]) -> None:
        self.sums = dict.fromkeys(trials, 0.0)
        self._opened = opened
        self._formats: dict[str, dict[Trial, ActivationFormat]] = {}
        self._changes: dict[str, dict[Trial, Tensor]] = {}
        self._slopes: dict[str, Tensor] = {}
        for trial in trials:
            rounded = opened.rounded(*trial)
            for name, weight in rounded.parameters.items():
                change = weight - opened.group.get_parameter(name).detach()
                self._changes.setdefault(name, {})[trial] = change.to(CHANGE)
            for module, fmt in rounded.activations.items():
                self._formats.setdefault(module, {})[trial] = fmt
        release_freed_memory()

    def add(self, states: States, behind: States, rows: range, *, last: bool) -> None:
        """Run rows forward and back, and count them; a slope is counted, and freed, as soon as it is known.

        Args:
            states: what flows in, leaves of the graph, which get gradients.
            behind: gradient with respect to what flows out.
            rows: their numbers.
            last: no more rows are added to these before what they change in weights is squared.
        """
        group = self._opened.group
        weights = {name: group.get_parameter(name).detach().requires_grad_() for name in self._changes}
        for name, weight in weights.items():
            weight.register_post_accumulate_grad_hook(partial(self._of_weight, name, last))  # type: ignore[no-untyped-call]
        seen: dict[tuple[int, tuple[Trial, ...]], _Input] = {}
        watched = {
            module: _Watch(next(iter(formats.values())), seen, formats)
            for module, formats in self._formats.items()
        }
        with torch.enable_grad():
            out = self._opened.run(states, rows, RoundedLayers(weights, watched))
        for one in seen.values():
            one.place.register_hook(partial(self._of_input, one))  # type: ignore[no-untyped-call]
        pairs = [(o, g.to(o.device)) for g, o in zip(behind, out, strict=True) if o.requires_grad]
        floats = [state for state in states if state.requires_grad]
        moved, upstream = zip(*pairs, strict=True)
        torch.autograd.backward(moved, upstream, inputs=[*floats, *weights.values()])

    def _of_weight(self, name: str, last: bool, weight: Tensor) -> None:
        slope = weight.grad
        weight.grad = None
        if slope is None:
            return
        if name in self._slopes:
            slope = slope.add_(self._slopes.pop(name))
        if not last:
            self._slopes[name] = slope
            return
        for trial, change in self._changes[name].items():
            self.sums[trial] += _squares(slope, change)

    def _of_input(self, one: _Input, slope: Tensor) -> None:
        x = one.place.detach()
        for trial, fmt in one.formats.items():
            self.sums[trial] += _squares(slope, fmt.fake_quantize(x) - x)


@dataclass(frozen=True, slots=True)
class _Input:
    """What flowed into some modules, as a place of its own in the graph, and how trials round it."""

    source: Tensor
    place: Tensor
    formats: Mapping[Trial, ActivationFormat]


@dataclass(frozen=True, slots=True)
class _Watch(WatchedFormat):
    """Stands for an activation format: changes nothing, and remembers what it saw.

    Modules that are given the same input, such as q, k and v, are one place: what its rounding changes in
    them adds up.
    """

    seen: dict[tuple[int, tuple[Trial, ...]], _Input]
    formats: Mapping[Trial, ActivationFormat]

    def fake_quantize(self, x: Tensor) -> Tensor:
        key = id(x), tuple(self.formats)
        if key not in self.seen:
            self.seen[key] = _Input(x, x.view_as(x), self.formats)
        return self.seen[key].place


def _squares(slope: Tensor, change: Tensor) -> float:
    """Sum over rows of the squared sum of slope x change in a row; both `[..., channels]`."""
    return float((slope.float() * change.to(slope.device)).sum(-1).double().square().sum())


def _save(path: Path, behind: int, gradient: States) -> None:
    """Keep the gradient of what flows into block `behind`: a killed run goes on with the one before."""
    tensors = {str(i): state for i, state in enumerate(gradient)}
    save_tensors(path, {**tensors, "behind": torch.tensor(behind, dtype=torch.int64, device=CPU)})


def _load(path: Path, count: int) -> tuple[int, States] | None:
    """What `_save` kept; None where nothing is."""
    if not path.is_file():
        return None
    found = load_tensors(path)
    return int(found["behind"]), tuple(found[str(i)] for i in range(count))
