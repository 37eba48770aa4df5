"""A run over a pipeline: captions drawn and recorded, components tuned, the folder written and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from auto_round.checkpoint.journal import Journal
from auto_round.checkpoint.workfolder import OutputFolder
from auto_round.diffusion.files import copy_pipeline, write_component
from auto_round.diffusion.original import original
from auto_round.diffusion.prepare import PipelineJob
from auto_round.diffusion.record import record
from auto_round.diffusion.reload import check_reload
from auto_round.diffusion.report import Made, write_reports
from auto_round.diffusion.rows import RecordedRows, RowWriter
from auto_round.diffusion.show import Shown, compare_pictures
from auto_round.diffusion.tune_component import ComponentRun, Held
from auto_round.log import ProgressSink, ignore_progress, logger
from auto_round.numerics.activation import ActivationFormat
from auto_round.pipeline.deciding.activations import activation_formats
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.plan_table import plan_table
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.machine.default_device import plain_device
from auto_round.pipeline.machine.determinism import deterministic_kernels
from auto_round.pipeline.machine.memory import release_freed_memory
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.pipeline.writing.into_folder import into_folder
from auto_round.pipeline.writing.outputs import Outputs, check_written
from auto_round.pipeline.writing.signature import request_digest, signature


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """A finished run over a pipeline.

    Attributes:
        folders: output folders, each a whole pipeline, in the order of the formats.
        report: what `report.json` says.
        seconds: wall time.
        peak_bytes: peak resident memory of the process.
    """

    folders: tuple[Path, ...]
    report: Mapping[str, Any]
    seconds: float
    peak_bytes: int


@plain_device()
def run_pipeline(
    job: PipelineJob, progress: ProgressSink = ignore_progress, clock: Clock | None = None
) -> PipelineResult:
    """Run a job that is prepared, or continue it where an earlier run was killed.

    Raises:
        AutoRoundError: see its subclasses; nothing half-valid is left under the output's name.
    """
    clock = clock or Clock()
    asked = {name: {**signature(part), **_asked(job)} for name, part in job.jobs.items()}

    def work(folder: OutputFolder) -> Mapping[str, Any]:
        clock.lap("prepare")
        with ExitStack() as stack:
            journals = {
                name: stack.enter_context(
                    Journal.open(_made(folder.scratch / name) / "journal.jsonl", asked[name])
                )
                for name in job.jobs
            }
            return _write_all(job, folder, journals, progress, clock)

    with deterministic_kernels(wanted=job.options.tune.enable_deterministic_algorithms):
        ended = into_folder(job.output, job.options.output, _digest(asked), work, source=job.pipeline.folder)
    return PipelineResult(tuple(job.folders(ended.folder).values()), ended.report, clock.seconds, clock.peak)


def _write_all(
    job: PipelineJob,
    folder: OutputFolder,
    journals: Mapping[str, Journal],
    progress: ProgressSink,
    clock: Clock,
) -> Mapping[str, Any]:
    """Everything that the output holds, and the report on it."""
    rows = _rows(job, folder.scratch, progress, clock)
    folders = job.folders(folder.folder)
    made: dict[str, Made] = {}
    for name in job.jobs:
        work = _Work(job, name, folder.scratch / name, journals[name], progress, clock)
        made[name] = work.run(folders, rows[name])
    with clock.stage("write", "the other components", progress):
        copy_pipeline(job, folders)
    shown = compare_pictures(job, folders, progress, clock) if job.prompts else None
    return write_reports(job, folders, made, _told(shown), folder.folder)


def _told(shown: Shown | None) -> dict[str, Any] | None:
    return None if shown is None else asdict(shown)


def _asked(job: PipelineJob) -> dict[str, Any]:
    """What a run over a pipeline is told beside what any run is."""
    call = job.call
    captions = hashlib.sha256("\n".join(job.captions).encode()).hexdigest()[:16]
    return {
        "captions": {"digest": captions, "count": len(job.captions), "tuned": job.tuned},
        "drawing": {
            "arguments": json.loads(json.dumps(dict(call.arguments), default=repr)),
            "steps": call.steps,
            "seed": call.seed,
            "at_once": call.at_once,
            "steps_per_caption": job.options.diffusion.steps_per_caption,
        },
        "prompts": list(job.prompts),
    }


def _digest(asked: Mapping[str, Mapping[str, Any]]) -> str:
    """Digest of what was asked for all components."""
    each = json.dumps({name: request_digest(part) for name, part in asked.items()}, sort_keys=True)
    return hashlib.sha256(each.encode()).hexdigest()[:32]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _rows(
    job: PipelineJob, scratch: Path, progress: ProgressSink, clock: Clock
) -> dict[str, RecordedRows | None]:
    """Rows of each component, those to tune on first; recorded unless an earlier run did."""
    if not job.captions:
        return dict.fromkeys(job.jobs)
    places = {name: scratch / name / "rows" for name in job.jobs}
    if any(RecordedRows.open(place) is None for place in places.values() if place.is_dir()) or not all(
        place.is_dir() for place in places.values()
    ):
        _record(job, places, progress, clock)
    found = {name: RecordedRows.open(place) for name, place in places.items()}
    return {name: None if rows is None else rows.arranged(_order(job, rows)) for name, rows in found.items()}


def _record(job: PipelineJob, places: Mapping[str, Path], progress: ProgressSink, clock: Clock) -> None:
    first, writers = job.first, {name: RowWriter(place) for name, place in places.items()}
    count = len(job.captions)
    with ExitStack() as stack:
        parts = {name: stack.enter_context(original(job, name)) for name in job.jobs}
        drawing = job.call.on(job.pipeline.load(first.dtype, first.device, parts))
        kept, until = job.options.diffusion.steps_per_caption, () if job.denoises else drawing.denoisers
        for done in record(drawing, job.captions, parts, writers, kept, until=until):
            progress(clock.event("calibrate", done, count, f"{count} captions"))
        del drawing
    for writer in writers.values():
        writer.finish()
    release_freed_memory()
    clock.lap("record")


def _order(job: PipelineJob, rows: RecordedRows) -> list[int]:
    """Rows to tune on, then those held out: of other captions, or every fourth where there is one caption."""
    if len(job.captions) > 1:
        apart = [entry.caption >= job.tuned for entry in rows.entries]
    else:
        apart = [i % 4 == 3 for i in range(len(rows))]
    return sorted(range(len(rows)), key=lambda i: apart[i])


def _tuned(job: PipelineJob, rows: RecordedRows) -> int:
    """How many of the arranged rows are tuned on."""
    if len(job.captions) > 1:
        return sum(entry.caption < job.tuned for entry in rows.entries)
    return len(rows) - len(rows) // 4


@dataclass(frozen=True, slots=True)
class _Work:
    """The work on one component of a run."""

    job: PipelineJob
    name: str
    scratch: Path
    journal: Journal
    progress: ProgressSink
    clock: Clock

    def run(self, folders: Mapping[str, Path], rows: RecordedRows | None) -> Made:
        """Tune, write and check the component in every format."""
        part = self.job.jobs[self.name]
        if rows is not None:
            part = replace(part, tuned=_tuned(self.job, rows))
        inside = {fmt: folder / self.name for fmt, folder in folders.items()}
        logger.info("%s: plan\n%s", self.name, plan_table(part))
        with Outputs.open(part, inside, self.journal) as outputs:
            source = self.job.source(self.name)
            held = ComponentRun(
                job=part,
                source=source,
                rows=rows,
                scratch=self.scratch,
                journal=self.journal,
                outputs=outputs,
                progress=self.progress,
                clock=self.clock,
            ).run()
            outputs.copy_rest()
            outputs.seal()
            nbytes = outputs.nbytes
        for fmt, exporter in part.exporters.items():
            write_component(part, exporter, source, inside[fmt])
        self.clock.lap("write")
        checked = self._check(part, inside, rows, held) if part.options.output.verify else {}
        return Made(part, self.journal, held, nbytes, checked, rows)

    def _check(
        self, part: Job, inside: Mapping[str, Path], rows: RecordedRows | None, held: Held | None
    ) -> dict[str, Any]:
        tuned = None if rows is None or held is None else (rows, held)
        with self.clock.stage("verify", f"{self.name}: reload and compare", self.progress):
            read_back = check_written(self.journal, inside, part.exporters)
            found: dict[str, Any] = {"tensors_read_back": read_back}
            kind = self.job.pipeline.kind(self.name)
            for fmt, folder in inside.items():
                plain = fmt == "fake" and tuned is not None  # dense weights do not say how inputs are rounded
                found[fmt] = check_reload(part, kind, folder, tuned, self._inputs(part) if plain else {})
        return found

    def _inputs(self, part: Job) -> dict[str, ActivationFormat]:
        """What inputs are rounded to, by module."""
        ranges = InputRanges.from_entries(self.journal.entries)
        return ranges.formats(activation_formats(part.plan, part.source.layers))
