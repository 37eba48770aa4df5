"""One component: its lists of blocks tuned one after another, and what that did to its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from auto_round.checkpoint.journal import Journal
from auto_round.diffusion.rows import RecordedRows
from auto_round.diffusion.trace_list import ListStreams, outputs, trace_list
from auto_round.log import ProgressSink
from auto_round.models.replayed_source import ReplayedSource
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.machine.memory import release_freed_memory
from auto_round.pipeline.plain_rounding import PlainRounding, bursts, round_layers
from auto_round.pipeline.quantize import groups_of, saved_streams
from auto_round.pipeline.running.lower import Fitting
from auto_round.pipeline.running.tune_group import GroupResult, GroupTuning
from auto_round.pipeline.writing.cost import COST, cost_of
from auto_round.pipeline.writing.group_figures import figures_of
from auto_round.pipeline.writing.outputs import Outputs, Written
from auto_round.tuning.objective import PLAIN


@dataclass(frozen=True, slots=True)
class Held:
    """What rounding did to the predictions of a component on rows that were not tuned on.

    Attributes:
        rows: how many there are; 0 where all were tuned on, which are looked at then.
        error: squared difference over squared prediction, all rows together.
        by_step: denoising step -> the same over its rows.
        outputs: number of a row -> what the quantized component predicts, for some of them.
    """

    rows: int
    error: float
    by_step: Mapping[int, float]
    outputs: Mapping[int, torch.Tensor]


CHECKED = 2
"""Rows whose predictions a reloaded folder has to give again."""


@dataclass(frozen=True, slots=True)
class ComponentRun:
    """The work on one component; what the journal calls finished is not done again."""

    job: Job
    source: ReplayedSource
    rows: RecordedRows | None
    scratch: Path
    journal: Journal
    outputs: Outputs
    progress: ProgressSink
    clock: Clock

    def run(self) -> Held | None:
        """Quantize all layers; returns what the held-out rows say when there are rows."""
        if self.rows is None:
            self._round()
            return None
        ended = self._tune(self.rows)
        return self._measure(self.rows, ended)

    def _tune(self, rows: RecordedRows) -> list[ListStreams]:
        job = self.job
        how = GroupTuning(PLAIN, job.options.calibration.seed, job.options.tune.enable_quanted_input)
        lists = [groups_of(blocks, job.options.tune.nblocks) for blocks in job.source.block_lists]
        count, done = sum(map(len, lists)), self.journal.finished
        if skipped := sum(1 for members in lists for unit, _ in members if unit in done):
            self.clock.skip(skipped)
        before, ended = 0, list[ListStreams]()
        for groups in lists:
            table, begun = trace_list(job, self.source, rows, self.scratch, ended)
            self.clock.lap("trace")
            streams = begun.streams
            fitting = Fitting(_sized(job, streams.reference[0].shape[1]), self.scratch)
            start = sum(1 for unit, _ in groups if unit in done)
            if start:
                streams.restore(saved_streams(self.scratch, before + start))
            for number, (unit, indices) in enumerate(groups[start:], start=before + start + 1):
                result = fitting.tune(indices, table, streams, how)
                written = self._write(result)
                if job.options.output.resume:
                    streams.save(saved_streams(self.scratch, number))
                self._done(unit, written, figures_of(result))
                release_freed_memory()  # blocks leave holes, which would add up
                if number > before + 1:  # what flows out of a list is needed until the end
                    saved_streams(self.scratch, number - 1).unlink(missing_ok=True)
                losses = {"loss": result.tuned.loss, "initial": result.tuned.initial_loss}
                self.progress(self.clock.event("tune", number, count, unit, **losses))
            before += len(groups)
            ended.append(begun)
        return ended

    def _write(self, result: GroupResult) -> Written:
        """Write the layers of a group."""
        written: Written = {}
        for layer, q in result.layers.values():
            written |= self.outputs.put(layer, q)
        for name, value in result.others.items():
            written |= self.outputs.put_plain(self.job.source.disk_name(name), value)
        return written

    def _measure(self, rows: RecordedRows, ended: Sequence[ListStreams]) -> Held:
        total, kept = dict[int, list[float]](), dict[int, torch.Tensor]()
        numbers = range(self.job.tuned, len(rows)) or range(len(rows))
        for i, reference, quantized in outputs(self.job, self.source, rows, ended, numbers):
            sums = total.setdefault(rows.entries[i].step, [0.0, 0.0])
            sums[0] += float((quantized - reference).double().square().sum())
            sums[1] += float(reference.double().square().sum())
            if len(kept) < CHECKED:
                kept[i] = quantized
        self.clock.lap("measure")
        error = sum(e for e, _ in total.values()) / max(1e-30, sum(s for _, s in total.values()))
        by_step = {step: e / max(1e-30, s) for step, (e, s) in sorted(total.items())}
        return Held(len(rows) - self.job.tuned, error, by_step, kept)

    def _round(self) -> None:
        """Plain rounding without data."""
        layers = self.job.quantized()
        left = {
            name: layer.nbytes for name, (layer, _) in layers.items() if name not in self.journal.finished
        }
        done = len(layers) - len(left)
        for burst in bursts(left):
            written = round_layers(
                PlainRounding.of(self.job), [layers[name] for name in burst], self.outputs.put
            )
            self.outputs.sync()
            self.journal.append(*({"unit": name, "tensors": written[name]} for name in burst))
            done += len(burst)
            self.progress(self.clock.event("tune", done, len(layers), burst[-1]))

    def _done(self, unit: str, tensors: Written, figures: Mapping[str, Any]) -> None:
        self.outputs.sync()
        cost = cost_of(unit, self.clock.lap("tune"), self.job.device)
        self.journal.append({"unit": unit, "tensors": tensors, **figures, COST: cost})


def _sized(job: Job, length: int) -> Job:
    """The job with as many rows in a pass as their length allows."""
    return replace(job, tune=replace(job.tune, rows_at_once=job.levels_for(length)[0].rows))
