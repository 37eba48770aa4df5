"""All blocks tuned together after each was tuned alone: what a run keeps, writes and writes down of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from auto_round.checkpoint.journal import Journal
from auto_round.errors import ConfigError
from auto_round.log import ProgressSink
from auto_round.numerics.qtensor import QTensor
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.distilling.shelf import begin
from auto_round.pipeline.distilling.stage import FOLDER, DistilledUnit, Stage, distill
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.running.attention_states import read_steps
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.pipeline.running.last_block import positions_held
from auto_round.pipeline.running.streams import Streams
from auto_round.pipeline.writing.outputs import Outputs, Written
from auto_round.report.record import DISTILLED
from auto_round.tuning.distill import distill_settings
from auto_round.tuning.sign_round import TunedBlock
from auto_round.tuning.student import student_of


@dataclass(frozen=True, slots=True)
class TimedSteps:
    """Tells of steps, with the time that is left.

    Attributes:
        count: steps of the stage.
        progress: receives an event a step.
        clock: of the run.
    """

    count: int
    progress: ProgressSink
    clock: Clock

    def begin(self, step: int) -> None:
        """The stage begins, or goes on, behind a step."""
        self.clock.skip(step)
        self.progress(self.clock.event("distill", step, self.count, "all blocks"))

    def step(self, step: int, look: tuple[float, float] | None) -> None:
        """Tell how many steps are taken.

        Args:
            step: how many were.
            look: divergence at the start and now, where the held-out rows were looked at.
        """
        losses = {} if look is None else {"initial": look[0], "loss": look[1]}
        self.progress(self.clock.event("distill", step, self.count, "all blocks", **losses))


def refuse_several(job: Job) -> None:
    """Refuse to tune all blocks together by several processes: one would work and the others wait.

    Raises:
        ConfigError: it is such a run.
    """
    if job.fresh and job.ranks.size > 1:
        raise ConfigError(
            f"distill_steps is the work of one process, and {job.ranks.size} were started: leave it out, or "
            "start one"
        )


def keep_learned(scratch: Path, unit: int, tuned: TunedBlock, *, codes_stay: bool) -> None:
    """Keep what tuning a unit of blocks learned, where all blocks go on from it.

    Args:
        scratch: folder of what only a continued run needs.
        unit: its number, from 0.
        tuned: the result.
        codes_stay: only steps of groups are learned further: codes, a byte each, do instead of offsets.
    """
    if tuned.learned:
        begin(scratch / FOLDER, unit, *student_of(tuned, codes_stay=codes_stay))


@dataclass(frozen=True, slots=True)
class AllBlocks:
    """All blocks of a run, each tuned and written already.

    Attributes:
        job: the run.
        members: indices of the blocks of each unit of block tuning.
        scratch: folder of what only a continued run needs.
        journal: of the run.
        outputs: what is written.
    """

    job: Job
    members: Sequence[Sequence[int]]
    scratch: Path
    journal: Journal
    outputs: Outputs

    def tune(self, streams: Streams, head: QTensor | None, steps: TimedSteps) -> None:
        """Tune them together, unless an earlier run did; what is better is written over what is there.

        Args:
            streams: behind the last block; their held-out rows are moved behind what is kept.
            head: the rounded head; None where it is kept.
            steps: tells how far it is.
        """
        moved, entries = self.scratch / "streams-distilled.safetensors", self.journal.entries
        if any(entry["unit"] == DISTILLED for entry in entries):
            if moved.exists():
                streams.restore(moved)
            return
        embedding = self.outputs.put_embedding()
        stage = Stage(
            job=self.job,
            config=distill_settings(self.job.options.tune, self.job.options.calibration.seed),
            members=self.members,
            scratch=self.scratch,
            embedding=None if embedding is None else embedding[0],
            head=head,
            positions=positions_held(self.job),
            ranges=InputRanges.from_entries(entries),
            states=read_steps(self.job.caches, entries),
        )
        written: Written = {}
        found = distill(stage, streams, lambda packed: written.update(self._put(packed)), steps)
        if written:
            streams.save(moved)
        self.outputs.sync()
        self.journal.append({"unit": DISTILLED, "tensors": written, DISTILLED: found})

    def _put(self, packed: DistilledUnit) -> Written:
        """Write a unit in every format."""
        written: Written = {}
        for layer, q in packed.layers.values():
            written |= self.outputs.put(layer, q)
        for name, value in packed.norms.items():
            written |= self.outputs.put_plain(self.job.source.disk_name(name), value)
        return written
