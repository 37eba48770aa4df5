"""The loop of the main job: trace, then block after block, then what is left, then verify and seal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from auto_round.checkpoint.journal import Journal, JournalCopy
from auto_round.checkpoint.workfolder import OutputFolder
from auto_round.config.options import Options
from auto_round.consumers.lines import judge_outputs
from auto_round.facts.layer import Block, Layer
from auto_round.log import ProgressSink, ignore_progress, logger
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.pipeline.all_blocks import AllBlocks, TimedSteps, keep_learned, refuse_several
from auto_round.pipeline.checking.verify import verify_all
from auto_round.pipeline.deciding.compiling import tuning_steps
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.plan_table import plan_table
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.deciding.smoothing import strength_of
from auto_round.pipeline.disk_need import refuse_full_disk
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.machine.default_device import plain_device
from auto_round.pipeline.machine.determinism import deterministic_kernels
from auto_round.pipeline.machine.memory import keep_freed_memory, release_freed_memory
from auto_round.pipeline.plain_rounding import (
    NOTHING_LEFT,
    PlainRounding,
    bursts,
    help_rounding,
    round_together,
)
from auto_round.pipeline.processes import Begun, joined, shared
from auto_round.pipeline.result import Result
from auto_round.pipeline.running.ahead import Ahead
from auto_round.pipeline.running.attention_states import read_steps
from auto_round.pipeline.running.compile import in_equal_passes, objective_for
from auto_round.pipeline.running.coverage import coverage_sentence
from auto_round.pipeline.running.expert_rows import cover_experts
from auto_round.pipeline.running.head import quantize_outside
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.pipeline.running.input_squares import save_inputs
from auto_round.pipeline.running.last_block import positions_held
from auto_round.pipeline.running.lower import Fitting
from auto_round.pipeline.running.measure import Measured, measure_streams
from auto_round.pipeline.running.smooth import find_changes, with_changes
from auto_round.pipeline.running.streams import Streams
from auto_round.pipeline.running.towers import quantize_towers
from auto_round.pipeline.running.trace_rows import trace_rows
from auto_round.pipeline.running.tune_group import GroupResult, GroupTuning
from auto_round.pipeline.writing.cost import COST, cost_of, run_record, write_record
from auto_round.pipeline.writing.finish import (
    build_report,
    hand_over_inputs,
    write_configs_and_tokenizer,
    write_report,
)
from auto_round.pipeline.writing.group_figures import digest_of, figures_of
from auto_round.pipeline.writing.into_folder import into_folder
from auto_round.pipeline.writing.outputs import Outputs, Written, check_written
from auto_round.pipeline.writing.signature import request_digest, signature
from auto_round.ranks.ranks import refuse_difference
from auto_round.tuning.objective import PLAIN


def run(
    options: Options,
    progress: ProgressSink = ignore_progress,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    dataset: Any = None,
    output: Path | None = None,
) -> Result:
    """Quantize a model and write it; the folders appear complete or not at all.

    A run that was interrupted continues where it was when called again with the same arguments on the same
    machine, and gives the same bytes as if it had not been. On a processor with other instructions sums
    differ in the last bit, so it is refused there.

    Args:
        options: what to do.
        progress: receives an event after each block.
        model: a model in memory instead of the one that `options` names; not modified.
        tokenizer: tokenizer object; None to load it.
        processor: processor object for images; None to load it when it is needed.
        dataset: calibration data as Python objects instead of the named data set.
        output: final folder; None for `options.output.output_dir`.

    Raises:
        AutoRoundError: see its subclasses; nothing half-valid is left under the output's name.
    """
    clock = Clock()
    live = {"model": model, "tokenizer": tokenizer, "processor": processor}
    with joined(options) as (ranks, own):
        job = shared(prepare(own, **live, dataset=dataset, output=output), ranks)
        return run_job(job, ignore_progress if ranks.rank else progress, clock)


@plain_device()
def run_job(job: Job, progress: ProgressSink, clock: Clock) -> Result:
    """Run a job that is prepared, or continue it where an earlier run was killed; see `run`."""
    refuse_several(job)
    with deterministic_kernels(wanted=job.options.tune.enable_deterministic_algorithms):
        return _follow(job, clock) if job.ranks.rank else _lead(job, progress, clock)


def _follow(job: Job, clock: Clock) -> Result:
    """What a rank does that is not the first: its part of the work, then wait until all of it is written."""
    begun: Begun | None = job.ranks.first(None)
    if begun is not None and job.rows is None:
        help_rounding(PlainRounding.of(job), job.ranks)
    elif begun is not None:
        job = job if begun.rows is None else replace(job, rows=begun.rows, tuned=begun.tuned)
        job = with_changes(job, begun.changes) if begun.changes else job
        seen = begun.scratch if begun.scratch.is_dir() else None  # another machine may have other disks
        with TemporaryDirectory(prefix=f"rank-{job.ranks.rank}-", dir=seen) as scratch:
            outputs = Outputs(job, {}, done=(), fresh=False)
            _Loop(job, Path(scratch), JournalCopy(begun.entries), outputs, ignore_progress, clock).run()
    nothing: dict[str, Any] = {}
    final, report = job.ranks.first((job.output, nothing))
    return Result(tuple(job.folders(final).values()), job.plan, report, clock.seconds, clock.peak)


def _lead(job: Job, progress: ProgressSink, clock: Clock) -> Result:
    """What the first rank does, or the only one: it writes, and tells others what is done already."""
    asked = signature(job)

    def work(folder: OutputFolder) -> dict[str, Any]:
        refuse_full_disk(job, folder)
        with Journal.open(folder.scratch / "journal.jsonl", asked) as journal:
            return _write_all(job, folder, journal, progress, clock)

    ended = into_folder(job.output, job.options.output, request_digest(asked), work, source=job.source.folder)
    if ended.earlier:
        job.ranks.first(None)
    job.ranks.first((ended.folder, ended.report))
    return Result(
        tuple(job.folders(ended.folder).values()), job.plan, ended.report, clock.seconds, clock.peak
    )


def _write_all(
    job: Job, folder: OutputFolder, journal: Journal, progress: ProgressSink, clock: Clock
) -> dict[str, Any]:
    """Everything that the output holds, and the report on it."""
    folders, continued = job.folders(folder.folder), bool(journal.entries)
    job = _begin(job, folder.scratch, journal, progress, clock)
    with Outputs.open(job, folders, journal) as outputs:
        clock.lap("prepare")
        logger.info("plan\n%s", plan_table(job, warned=True))
        measured = _Loop(job, folder.scratch, journal, outputs, progress, clock).run()
        with clock.stage("write", "remaining tensors", progress):
            outputs.copy_rest()
            outputs.seal()
            write_configs_and_tokenizer(job, folders)
            report = build_report(job, journal, measured, outputs.nbytes)
            if poor := coverage_sentence(report.get("experts", {})):
                logger.warning(poor)
            report["engines"] = judge_outputs(folders)
        if job.options.output.verify:
            with clock.stage("verify", "reload and compare", progress):
                report["tensors_read_back"] = check_written(journal, folders, job.exporters)
                ranges = InputRanges.from_entries(journal.entries)
                states = read_steps(job.caches, journal.entries)
                report["verified"] = verify_all(job, folders, measured, ranges, states)
    write_report(job, folders, report, folder.folder)
    write_record(folder.folder, run_record(job, journal, clock, continued=continued))
    hand_over_inputs(job, folder.scratch, folder.folder)
    return report


def _begin(job: Job, scratch: Path, journal: Journal, progress: ProgressSink, clock: Clock) -> Job:
    """The job with all of its rows, on the model as it is rounded; other ranks are told of both.

    They are told, too, of what is done already.
    """
    whole = cover_experts(job, scratch)
    changes = find_changes(whole, scratch, progress, clock)
    rows = None if whole is job else whole.rows
    job.ranks.first(Begun(journal.entries, scratch, rows, whole.tuned, changes))
    return with_changes(whole, changes) if strength_of(whole) else whole


@dataclass(frozen=True, slots=True)
class _Loop:
    """The loop over the blocks. What the journal calls finished is not done again.

    Attributes:
        job: the run.
        scratch: folder of what only a continued run needs.
        journal: of the run.
        outputs: what is written.
        progress: receives events.
        clock: of the run.
    """

    job: Job
    scratch: Path
    journal: Journal
    outputs: Outputs
    progress: ProgressSink
    clock: Clock

    def run(self) -> Measured | None:
        """Quantize all layers; returns what the held-out rows say when there are any."""
        if self.job.rows is None:
            self._round_layers()
            self.clock.lap("round")
            return None
        streams = self._tune_blocks()
        if self.job.ranks.rank:  # the first rank does what is left, and writes
            return None
        head, inputs = quantize_outside(self.job, streams, self._write)
        if inputs and self.job.saves_imatrix:
            save_inputs(self.scratch, "head", inputs)
        if self.job.fresh:
            members = [m for _, m in groups_of(self.job.source.blocks, self.job.options.tune.nblocks)]
            steps = TimedSteps(self.job.options.tune.distill_steps, self.progress, self.clock)
            AllBlocks(self.job, members, self.scratch, self.journal, self.outputs).tune(streams, head, steps)
            self.clock.lap("distill")
        measured = measure_streams(self.job, streams, head)
        self.clock.lap("measure")
        return measured

    def _tune_blocks(self) -> Streams:
        """Quantize all blocks, list by list; returns the streams behind the last of them."""
        job, embedding = self.job, self._embedding()
        how = self._group_tuning()
        if how.objective.loss is not PLAIN.loss:
            job = replace(job, tune=in_equal_passes(job.tune, job.tuned, job.ranks.size))
        lists = [groups_of(blocks, job.options.tune.nblocks) for blocks in job.source.block_lists]
        count, ended = sum(map(len, lists)), list[Streams]()
        towers = quantize_towers(job, self._write)
        with Ahead(job) as ahead:
            fitting = Fitting(job, self.scratch, ahead)
            for groups in lists:
                before = sum(map(len, lists[: len(ended)]))
                table, streams = trace_rows(job, self.scratch, embedding, ended, towers)
                release_freed_memory()
                self.clock.lap("trace")
                if not ended:
                    self._say_begun([unit for members in lists for unit, _ in members])
                start = sum(1 for unit, _ in groups if unit in self.journal.finished)
                if start:
                    self._restore(streams, before + start)
                left = groups[start:]
                followed = zip(left, [*(i for _, i in left[1:]), []], strict=False)  # none may be left
                for number, ((unit, indices), following) in enumerate(followed, start=before + start + 1):
                    result = fitting.tune(indices, table, streams, how, following)
                    refuse_difference(job.ranks, f"codes of {unit}", digest_of(job, result))
                    losses = self._keep(result, unit, number, streams, fitting.lowered)
                    del result  # not to be held beside the next group
                    if number > before + 1:  # what flows out of a list is needed until the end
                        saved_streams(self.scratch, number - 1).unlink(missing_ok=True)
                    self.progress(self.clock.event("tune", number, count, unit, **losses))
                    release_freed_memory()  # blocks leave holes, which would add up
                ended.append(streams)
        release_freed_memory()
        return ended[-1]

    def _group_tuning(self) -> GroupTuning:
        """What is the same for all groups of blocks."""
        job, options = self.job, self.job.options
        return GroupTuning(
            objective=replace(objective_for(tuning_steps(job)), ranks=job.ranks),
            seed=options.calibration.seed,
            from_quantized=options.tune.enable_quanted_input,
            positions=positions_held(job) if options.tune.enable_alg_ext else 0,
        )

    def _say_begun(self, units: Sequence[str]) -> None:
        """Tell what the rows are, and how far an earlier run came."""
        job = self.job
        if job.rows is not None:
            self.progress(self.clock.event("calibrate", 1, 1, job.rows.summary))
        start = sum(1 for unit in units if unit in self.journal.finished)
        if start:
            logger.info("continuing after %s of %s", units[start - 1], units[-1])
            self.clock.skip(start)
        if job.device.type == "cpu" and job.rows is not None:
            keep_freed_memory()

    def _embedding(self) -> Tensor | None:
        """The token embedding as the output stores it, written first; None where no output rounds it."""
        return self.job.ranks.first(self._write_embedding())

    def _write_embedding(self) -> Tensor | None:
        """The same for the rank that writes, which journals it."""
        weight, written = self.outputs.put_embedding() or (None, {})
        if written:
            self._done("embedding", written)
        return weight

    def _round_layers(self) -> None:
        """Plain rounding without data, journaled burst by burst."""
        if self.outputs.share_embedding:
            self._write_embedding()
        layers = self.job.quantized()
        units: dict[str, list[str]] = {}
        for layer, _ in layers.values():
            unit = layer.name if layer.block is None else self.job.source.blocks[layer.block].disk
            units.setdefault(unit, []).append(layer.name)
        left = {unit: names for unit, names in units.items() if unit not in self.journal.finished}
        sizes = {unit: sum(layers[n][0].nbytes for n in names) for unit, names in left.items()}
        done = len(units) - len(left)
        if self.job.device.type == "cpu":
            keep_freed_memory(of_any_size=True)
        with ThreadPoolExecutor(1) as keeper:  # waits for the disk while the next burst is rounded
            kept: Future[None] | None = None
            for burst in bursts(sizes, self.job.ranks.size):
                chosen = [layers[n] for unit in burst for n in left[unit]]
                written = round_together(self.job, chosen, self.outputs)
                if kept is not None:
                    kept.result()
                parts = {unit: dict(t for n in left[unit] for t in written[n].items()) for unit in burst}
                kept = keeper.submit(self._keep_burst, parts)
                for unit in burst:
                    done += 1
                    self.progress(self.clock.event("tune", done, len(units), unit))
            self.job.ranks.first(NOTHING_LEFT)
            if kept is not None:
                kept.result()
        release_freed_memory()

    def _keep_burst(self, parts: Mapping[str, Written]) -> None:
        """Write down what is finished, once it is durable."""
        self.outputs.sync()
        self.journal.append(*({"unit": unit, "tensors": written} for unit, written in parts.items()))

    def _restore(self, streams: Streams, number: int) -> None:
        """Take the streams up again that an earlier run saved before group `number`."""
        if not self.job.ranks.rank:
            streams.restore(saved_streams(self.scratch, number))
        self.job.ranks.spread((*streams.reference, *streams.quantized))

    def _keep(
        self, result: GroupResult, unit: str, number: int, streams: Streams, lowered: str
    ) -> dict[str, float]:
        """Write a finished group so that a killed run can continue after it; returns its losses."""
        written: Written = {}
        for layer, q in result.layers.values():
            written |= self.outputs.put(layer, q)
        for name, value in result.others.items():
            written |= self.outputs.put_plain(self.job.source.disk_name(name), value)
        for attention, scales in result.states.items():
            written |= self.outputs.put_scales(attention, scales)
        leads = not self.job.ranks.rank
        if result.inputs and leads:
            save_inputs(self.scratch, f"{number:04d}", result.inputs)
        if leads:
            codes_stay = self.job.options.tune.distill_scales_only
            keep_learned(self.scratch, number - 1, result.tuned, codes_stay=codes_stay)
        if self.job.options.output.resume and leads:
            streams.save(saved_streams(self.scratch, number))
        cost = cost_of(unit, self.clock.lap("tune"), self.job.device, lowered)
        self._done(unit, written, {**figures_of(result), COST: cost})
        return {"loss": result.tuned.loss, "initial": result.tuned.initial_loss}

    def _write(self, layer: Layer, q: QuantizedLayer) -> None:
        """Write a layer outside the blocks, unless an earlier run did."""
        if layer.name not in self.journal.finished:
            self._done(layer.name, self.outputs.put(layer, q))

    def _done(self, unit: str, tensors: Written, figures: Mapping[str, Any] | None = None) -> None:
        self.outputs.sync()
        self.journal.append({"unit": unit, "tensors": tensors, **(figures or {})})


def groups_of(blocks: Sequence[Block], size: int) -> list[tuple[str, list[int]]]:
    """Name and block indices of each unit of a list that is tuned as one."""
    units = []
    for start in range(0, len(blocks), size):
        members = blocks[start : start + size]
        name = members[0].disk if len(members) == 1 else f"{members[0].disk} to {members[-1].disk}"
        units.append((name, [b.index for b in members]))
    return units


def saved_streams(scratch: Path, number: int) -> Path:
    """File of the streams before group `number`."""
    return scratch / f"streams-{number:04d}.safetensors"
