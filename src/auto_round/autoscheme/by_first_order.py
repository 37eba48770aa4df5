"""Sensitivity to first order: gradients of the text's loss in the rounded model, times what rounding changed.

This is the score that auto-round has published ("DeltaLoss"). All layers are rounded by an option; the loss
of the text is differentiated once; a layer's score is the sum of |gradient x (weight - rounded weight)|, and
of the same for its inputs where these are rounded. Rows go through one by one, so the sums do not depend on
what runs together. docs/LOG.md compares it: second order gives better plans, so this is there for comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from auto_round.autoscheme.outside import weight_outside
from auto_round.autoscheme.parts import (
    OpenBlock,
    Part,
    RoundedLayers,
    ScoringSetting,
    WatchedFormat,
    find_parts,
    open_block,
    taken,
)
from auto_round.autoscheme.start import begin
from auto_round.calibration.row import CalibrationRow
from auto_round.facts.flow import States
from auto_round.facts.model import TOKENS
from auto_round.models.source import CPU
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.streams import home_of_streams, room_like
from auto_round.tuning.samples import leaf

Sums = dict[Part, float]


def measure(
    setting: ScoringSetting, parts: Sequence[Part], scratch: Path
) -> Iterator[tuple[Part, list[float]]]:
    """Bound of the change of the mean loss to first order, nats per token, for each option.

    Options are measured one after another, and nothing is known of any part before the last one.

    Args:
        setting: what is measured, and on what.
        parts: parts to measure.
        scratch: folder for what does not fit into memory.

    Yields:
        Each part with its scores.

    Raises:
        NumericsError: a weight is not finite.
    """
    table, start, masks = begin(setting, scratch)
    every = find_parts(setting.candidates)
    found = {part: [0.0] * len(setting.options) for part in parts}
    for option in setting.options:
        rounded = [part for part in every if not setting.keeps(part, option)]
        sums = _Pass(setting, option, rounded, table, masks, scratch).sums(start) if rounded else {}
        for part in parts:
            found[part][option] = sums.get(part, 0.0)
    yield from found.items()


@dataclass(slots=True)
class _Pass:
    """The model with all parts rounded by one option, once forward and once backward."""

    setting: ScoringSetting
    option: int
    parts: Sequence[Part]
    table: ArgumentTable
    masks: Tensor | None
    scratch: Path

    def sums(self, start: States) -> Sums:
        """Score of each part, summed over all rows."""
        boundaries = self._forward(start)
        found, gradient = self._at_the_end(boundaries[-1])
        for block in reversed(self.setting.job.source.blocks):
            flowing = boundaries[block.index]
            with self._opened(block.index, flowing) as (opened, rounded):
                for row in range(start[0].shape[0]):
                    for part, score in _of_row(opened, rounded, flowing, gradient, row).items():
                        found[part] = found.get(part, 0.0) + score
            del boundaries[block.index + 1 :]
        return found

    def _forward(self, start: States) -> list[States]:
        """What flows into each block of the rounded model, and out of the last."""
        job = self.setting.job
        count = len(job.source.blocks) + 1
        nbytes = count * sum(state.numel() * state.element_size() for state in start)
        home = home_of_streams(job.level, job.memory, job.device, nbytes)
        spill = self.scratch / f"first-{self.option}"
        boundaries = [start]
        for block in job.source.blocks:
            out = room_like(start, str(block.index), home, spill)
            with self._opened(block.index, boundaries[-1]) as (opened, rounded):
                opened.pass_on(boundaries[-1], out, _together(rounded.values()))
            boundaries.append(out)
        return boundaries

    @contextmanager
    def _opened(self, index: int, flowing: States) -> Iterator[tuple[OpenBlock, dict[Part, RoundedLayers]]]:
        """A block, and how each of its parts is rounded."""
        mine = [part for part in self.parts if part.block == index]
        with open_block(self.setting, index, self.table, mine) as opened:
            if mine:
                opened.observe(flowing, mine, self.masks)
            yield opened, {part: opened.rounded(part, self.option) for part in mine}

    def _at_the_end(self, final: States) -> tuple[Sums, States]:
        """Scores of the head, and the slope of the mean loss along what flows out of the last block."""
        job = self.setting.job
        rows = job.all_rows
        counts = [_counted(row) for row in rows]
        total = max(1, sum(int(count.sum()) for count in counts))
        heads = [part for part in self.parts if part.block is None]
        gradient = tuple(torch.zeros_like(state) for state in final)
        found: Sums = {}
        with job.source.stem(job.device, job.dtype) as stem:
            own = [job.source.read(self.setting.candidates.layers[p.layers[0]]).to(job.device) for p in heads]
            rounded = [weight_outside(self.setting, part, self.option).requires_grad_() for part in heads]
            for r, (row, count) in enumerate(zip(rows, counts, strict=True)):
                hidden = final[0][r : r + 1].to(job.device).requires_grad_()
                with torch.enable_grad():
                    likely = stem.finish(hidden, *rounded)[0].float().log_softmax(-1)
                    following = row.inputs[TOKENS][0, 1:].to(likely.device)
                    losses = -likely[:-1].gather(-1, following.unsqueeze(-1)).squeeze(-1)
                    loss = losses[count.to(losses.device)].sum() / total
                found_here = torch.autograd.grad(loss, [hidden, *rounded])
                gradient[0][r] = found_here[0][0].to(gradient[0].device)
                for part, before, after, slope in zip(heads, own, rounded, found_here[1:], strict=True):
                    found[part] = found.get(part, 0.0) + _weighed(slope, before - after.detach())
        return found, gradient


def _of_row(
    opened: OpenBlock, rounded: Mapping[Part, RoundedLayers], flowing: States, gradient: States, row: int
) -> Sums:
    """Scores of the parts of a block on one row; `gradient` of that row moves to what flows in."""
    device, rows = opened.setting.job.device, range(row, row + 1)
    states = tuple(leaf(s.to(device)) for s in taken(flowing, rows))
    floats = [state for state in states if state.requires_grad]
    together = _together(rounded.values())
    weights = {name: weight.detach().requires_grad_() for name, weight in together.parameters.items()}
    inputs = {name: _Recorded(fmt) for name, fmt in together.activations.items()}
    with torch.enable_grad():
        out = opened.run(states, rows, RoundedLayers(weights, inputs))
    behind = taken(gradient, rows)
    pairs = [(o, g.to(o.device)) for g, o in zip(behind, out, strict=True) if o.requires_grad]
    # What only chooses (a sparse attention's indexer) is computed without gradients.
    seen = [(n, *pair) for n, recorded in inputs.items() for pair in recorded.pairs if pair[1].requires_grad]
    wanted = [*floats, *weights.values(), *(after for _, _, after in seen)]
    moved, upstream = zip(*pairs, strict=True)
    slopes = torch.autograd.grad(moved, wanted, upstream, allow_unused=True, materialize_grads=True)
    of_states = [to for to, state in zip(gradient, states, strict=True) if state.requires_grad]
    for to, value in zip(of_states, slopes, strict=False):
        to[row : row + 1] = value.to(to.device)
    of_weights = dict(zip(weights, slopes[len(floats) :], strict=False))
    scores = {
        name: _weighed(of_weights[name], opened.originals[name] - w.detach()) for name, w in weights.items()
    }
    for (name, change, _), slope in zip(seen, slopes[len(floats) + len(weights) :], strict=True):
        scores[name] = scores.get(name, 0.0) + _weighed(slope, change)
    return {
        part: sum(scores.get(name, 0.0) for name in (*how.parameters, *how.activations))
        for part, how in rounded.items()
    }


@dataclass(frozen=True, slots=True)
class _Recorded(WatchedFormat):
    """An activation format that remembers what it changed: pairs of the change and the rounded inputs."""

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def fake_quantize(self, x: Tensor) -> Tensor:
        rounded = self.format.fake_quantize(x)
        self.pairs.append(((x - rounded).detach(), rounded))
        return rounded


def _together(parts: Iterable[RoundedLayers]) -> RoundedLayers:
    """All parts of a block rounded at once."""
    listed = list(parts)
    return RoundedLayers(
        {name: weight for part in listed for name, weight in part.parameters.items()},
        {name: fmt for part in listed for name, fmt in part.activations.items()},
    )


def _counted(row: CalibrationRow) -> Tensor:
    """Which tokens behind the first are predicted, `[length - 1]` bool."""
    length = row.inputs[TOKENS].shape[-1]
    return torch.ones(length - 1, dtype=torch.bool, device=CPU) if row.mask is None else row.mask[1:]


def _weighed(slope: Tensor, change: Tensor) -> float:
    """Sum of |slope x change|."""
    return float((slope.float() * change.to(slope.device).float()).abs().double().sum())
