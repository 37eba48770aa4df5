"""The stage itself: steps, looks at held-out rows, and what is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from auto_round.facts.flow import States
from auto_round.facts.group_names import outside
from auto_round.facts.layer import Layer
from auto_round.log import logger
from auto_round.numerics.head_steps import HeadSteps
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.pipeline.deciding.fit import workload
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.distilling.feed import Feed, StepRows, trace_some, whole
from auto_round.pipeline.distilling.shelf import Shelf
from auto_round.pipeline.distilling.sweep import Boundaries, Sweep, squared_error
from auto_round.pipeline.distilling.units import Units
from auto_round.pipeline.fitting.states import states_in_memory
from auto_round.pipeline.fitting.together import Together
from auto_round.pipeline.running.head import head_weight
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.pipeline.running.streams import Streams, home_of_streams
from auto_round.pipeline.running.tune_group import layers_of
from auto_round.tuning.distill import DistillConfig, row_order, rows_of_step
from auto_round.tuning.predictions import Ends, summed_divergence

FOLDER = "distill"
"""Where the states lie, in the scratch folder of a run."""
SECONDS_APART = 60.0
"""Time after which the states are made durable, at the latest: all of them are written then."""


class Told(Protocol):
    """Hears how far the stage is."""

    def begin(self, step: int) -> None:
        """The stage begins, or goes on, behind a step."""
        ...

    def step(self, step: int, look: tuple[float, float] | None) -> None:
        """A step is taken; the divergence at the start and now, where it was looked at."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """What the stage goes on from.

    Attributes:
        job: the run.
        config: settings.
        members: indices of the blocks of each unit of block tuning.
        scratch: folder of what only a continued run needs.
        embedding: as the output stores it; None for the model's own.
        head: the rounded head; None where it is kept.
        positions: whose logits are held at a time.
        ranges: extremes of inputs that calibration fixed.
        states: attention module -> part -> its steps, where these are calibrated.
    """

    job: Job
    config: DistillConfig
    members: Sequence[Sequence[int]]
    scratch: Path
    embedding: Tensor | None = None
    head: QTensor | None = None
    positions: int = 1
    ranges: InputRanges = field(default_factory=InputRanges)
    states: Mapping[str, Mapping[str, HeadSteps]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DistilledUnit:
    """One unit of blocks as all blocks together were tuned: what is written over the earlier result.

    Attributes:
        layers: quantized layers by name.
        norms: learned norms by parameter name.
    """

    layers: Mapping[str, tuple[Layer, QuantizedLayer]]
    norms: Mapping[str, Tensor]


def distill(
    stage: Stage, streams: Streams, put: Callable[[DistilledUnit], None], told: Told
) -> dict[str, Any]:
    """Tune all blocks together; what held-out rows find better than before is put.

    Args:
        stage: what to go on from.
        streams: behind the last block. Their held-out rows judge; the quantized ones are replaced where
            something is put.
        put: receives each unit, in order, if any step is kept.
        told: hears of every step.

    Returns:
        What the report says.
    """
    job = stage.job
    with job.source.stem(job.device, job.dtype) as stem, torch.no_grad():
        head = head_weight(job, stage.head)
        ends = Ends(lambda x: stem.finish(x, head), stem.finish, stage.positions)
        loop = _Loop(stage, ends, streams, told)
        found = loop.run()
        if found["kept_step"]:
            loop.pack(put)
    _say(found)
    return found


def _say(found: Mapping[str, Any]) -> None:
    """Tell the user in one line what the stage gave."""
    before, best, kept, steps = (found[name] for name in ("kl_before", "kl_best", "kept_step", "steps"))
    if kept:
        words = "all blocks together: KL on held-out rows %.4g -> %.4g nats per token, kept step %d of %d"
        logger.info(words, before, best, kept, steps)
    else:
        words = "all blocks together: none of %d steps was better on held-out rows (KL %.4g): nothing changed"
        logger.warning(words, steps, before)


class _Loop:
    """The steps. What the shelf calls durable is not done again."""

    def __init__(self, stage: Stage, ends: Ends, streams: Streams, told: Told) -> None:
        self._stage, self._ends, self._streams, self._told = stage, ends, streams, told
        self._folder = stage.scratch / FOLDER
        job, config = stage.job, stage.config
        self._work = workload(job)
        in_memory = states_in_memory(config, self._work.quantized, job.memory)
        self._shelf = Shelf(self._folder, len(stage.members), in_memory=in_memory)
        self._units = Units(job, stage.members, self._shelf, stage.ranges, stage.states)
        self._held = whole(*trace_some(job, job.held_out, self._folder / "held", stage.embedding))

    def run(self) -> dict[str, Any]:
        """Take all steps; what is kept is on the shelf then."""
        stage, config, shelf = self._stage, self._stage.config, self._shelf
        rows = stage.job.fresh
        per_step = rows_of_step(len(rows[0]))
        order = row_order(len(rows), per_step, config.steps, config.seed)
        feed = Feed(stage.job, rows, order, scratch=self._folder / "rows", embedding=stage.embedding)
        told = shelf.progress or self._begin()
        sweep = Sweep(self._units, self._ends, config, told["scales"], stay=told["stay"])
        room = self._room(feed.batch(told["step"] % config.steps))
        self._told.begin(told["step"])
        durable = time.monotonic()
        for step in range(told["step"], config.steps):
            loss = sweep.step(feed.batch(step), room, step)
            done = step + 1
            if not math.isfinite(loss):
                logger.warning("distillation stopped after step %d: its loss became %s", done, loss)
                break
            if done in config.looks:
                told = self._judged(told, done)
            if done in config.looks or time.monotonic() - durable > SECONDS_APART:
                shelf.make_durable(done, told)
                durable = time.monotonic()
            look = (told["kl_before"], told["looks"][-1][1]) if done in config.looks else None
            self._told.step(done, look)
        shelf.take_best()
        return {
            "steps": config.steps,
            "rows": len({i for each in order for i in each}),
            "tokens": sum(rows[i].positions for each in order for i in each),
            "kl_before": told["kl_before"],
            "kl_best": told["kl_best"],
            "kept_step": told["best"],
            "looks": told["looks"],
        }

    def pack(self, put: Callable[[DistilledUnit], None]) -> None:
        """Round the states that are kept, and move the held-out rows of the quantized stream past them."""
        job, flow = self._stage.job, self._held.quantized
        for number in range(len(self._stage.members)):
            put(self._packed(job, number, flow))
        for to, state in zip(self._streams.quantized, flow, strict=True):
            to[self._streams.tuned :] = state.to(to.device)

    def _packed(self, job: Job, number: int, flow: States) -> DistilledUnit:
        """One unit rounded; the held-out rows are moved past it."""
        with self._units.open(number, self._held.rows) as here:
            codes, parameters = here.quantized()
            here.run_rounded(parameters, flow, flow)
            layers = layers_of(job, self._stage.members[number], codes, here.activations)
            norms = {outside(n, here.prefixes): v for n, v in here.student.kept_norms().items()}
            return DistilledUnit(layers, norms)

    def _begin(self) -> dict[str, Any]:
        """Divergence and squared errors before the first step, made durable."""
        kl, scales = self._look(errors=True)
        told = {
            "step": 0,
            "best": 0,
            "kl_before": kl,
            "kl_best": kl,
            "scales": scales,
            "stay": len(Together.of(self._work, self._stage.job.level).stay()),
            "looks": [[0, kl]],
        }
        self._shelf.make_durable(0, told)  # what is kept if no step is better, also if the first one fails
        return told

    def _judged(self, told: Mapping[str, Any], done: int) -> dict[str, Any]:
        """What is known after another look at the held-out rows."""
        kl, _ = self._look()
        looks = [*told["looks"], [done, kl]]
        better = {"best": done, "kl_best": kl} if kl < told["kl_best"] else {}
        return {**told, **better, "looks": looks}

    def _look(self, *, errors: bool = False) -> tuple[float, list[float]]:
        """Mean divergence on the held-out rows, nats; and the squared error behind each unit if asked for."""
        rows = self._held.rows
        flow = tuple(state.clone() for state in self._held.quantized)
        original = tuple(state.clone() for state in self._held.reference) if errors else ()
        found: list[float] = []
        for number in range(len(self._stage.members)):
            self._pass_held(number, flow, original)
            if errors:
                hidden = self._units.flowing(number)
                pairs = enumerate(zip(flow[:hidden], original[:hidden], strict=True))
                found.append(sum(squared_error(a, b, rows.mask_of(i)) for i, (a, b) in pairs))
        return self._divergence(flow), found

    def _pass_held(self, number: int, flow: States, original: States) -> None:
        """Move the held-out rows past one unit, rounded; and others, if there are any, past the original."""
        with self._units.open(number, self._held.rows) as here:
            _, parameters = here.quantized()
            here.run_rounded(parameters, flow, flow)
            if original:
                here.run_original(original, original)

    def _divergence(self, flow: States) -> float:
        """Mean over positions that count of the held-out rows."""
        total, count, device = 0.0, 0, self._stage.job.device
        expected = self._streams.reference[0][self._streams.tuned :]
        masks = self._held.rows.masks
        for row, (found, wanted) in enumerate(zip(flow[0], expected, strict=True)):
            here = slice(None) if masks is None else masks[row]
            some = found[here].to(device)
            part, _ = summed_divergence(some, wanted[here].to(device), self._ends, gradient=False)
            total, count = total + float(part), count + len(some)
        return total / max(1, count)

    def _room(self, batch: StepRows) -> Boundaries:
        job, units = self._stage.job, len(self._stage.members)
        size = (2 * units + 1) * sum(s.numel() * s.element_size() for s in batch.reference)
        home = home_of_streams(job.level, job.memory, job.device, size)
        return Boundaries.like(batch, units, home, self._folder / "between")
