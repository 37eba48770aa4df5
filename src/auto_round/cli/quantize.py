"""The main command: options in, a quantized model on disk and a summary out."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_round.cli.launched import ended_by_launcher
from auto_round.cli.measured import evaluated
from auto_round.cli.output_folder import with_named_folder
from auto_round.cli.progress import drawn_progress
from auto_round.cli.summary import summary
from auto_round.config import EvaluationOptions, ModelOptions, Options, build_options, read_environment
from auto_round.log import ignore_progress, logger
from auto_round.models.hub import holds_pipeline
from auto_round.ranks.place import place
from auto_round.report.record import EVALUATION_SUFFIX, PAGE

if TYPE_CHECKING:
    from auto_round.evaluate.task_names import Tasks
    from auto_round.pipeline.deciding.job import Job
    from auto_round.ranks.ranks import Ranks


def quantize(given: Mapping[str, Any], recipe: str, evaluation: Mapping[str, Any]) -> None:
    """Do what the options say and print what came of it.

    Args:
        given: options of the run that were written.
        recipe: its recipe.
        evaluation: options of the evaluation behind it that were written.

    Raises:
        AutoRoundError: the request is wrong, or the work failed.
    """
    environment = read_environment()
    wanted = EvaluationOptions(**evaluation)
    if evaluation and wanted.tasks is None:
        logger.warning("%s: no effect without --tasks", ", ".join(f"--{name}" for name in evaluation))
    options = with_named_folder(build_options(given, recipe, environment))
    set_threads(environment.num_threads)
    if holds_pipeline(options.model.model, options.model.platform):
        from auto_round.cli.pipelines import quantize_pipeline

        quantize_pipeline(options, evaluation)
        return
    tasks = None
    if wanted.tasks is not None:
        from auto_round.evaluate.harness import check_can_read
        from auto_round.evaluate.task_names import find_tasks

        check_can_read(wanted, options.output.formats[-1])
        tasks = find_tasks(wanted)
    here = place()
    if options.output.dry_run:
        if here is not None and here.rank:
            return
        from auto_round.pipeline.dry_run import dry_run

        print("\n\n".join(dry_run(part).text for part in _runs(options)))
        return
    if tasks is not None and (here is None or not here.rank):
        _fetch(tasks)
    from auto_round.pipeline.processes import joined

    with ended_by_launcher(here), joined(options) as (ranks, own):
        written = _run_all(own, ranks)
    if here is not None and here.rank:
        return
    if tasks is not None and written:
        _evaluate(tasks, _last_asked(options.output.formats[-1], written), options.model)


def _last_asked(asked: str, written: Mapping[str, Path]) -> Path:
    """Folder of the format that the user named last, wherever it was written among the others.

    Args:
        asked: its name; `gguf`, or the default, where the scheme says which GGUF file is written.
        written: name of each format -> its folder.
    """
    from auto_round.export.table import full_name

    of_kind = (folder for name, folder in written.items() if name.startswith(f"{asked}:"))
    return written.get(full_name(asked)) or next(of_kind, list(written.values())[-1])


def _run_all(options: Options, ranks: Ranks) -> dict[str, Path]:
    """Do all runs of a request and say what came of them; format -> folder, of several targets the last."""
    from auto_round.pipeline.machine.clock import Clock
    from auto_round.pipeline.plain_processes import follow, prepared
    from auto_round.pipeline.plain_rounding import PlainRounding
    from auto_round.pipeline.processes import chosen

    clock = Clock()
    jobs = [prepared(part, ranks, _prepare) for part in chosen(options, ranks, _runs)]
    written: dict[str, Path] = {}
    for job in jobs:
        if isinstance(job, PlainRounding):
            follow(job, ranks)
            continue
        from auto_round.pipeline.quantize import run_job

        try:
            with nullcontext(ignore_progress) if ranks.rank else drawn_progress() as progress:
                result = run_job(job, progress, clock)
        except KeyboardInterrupt:
            if job.options.output.resume:
                logger.warning("the same command continues where this run stopped (%s.partial)", job.output)
            raise
        if not ranks.rank:
            print(summary(result))
            if job.options.output.report:
                print(f"{'page':<12}{job.output / PAGE}")
        written |= zip(job.exporters, result.folders, strict=True)
        clock = Clock()
    return written


def _prepare(options: Options) -> Job:
    """Prepare a run; a process that only rounds what another sends imports none of this."""
    from auto_round.pipeline.deciding.prepare import prepare

    quiet_transformers()
    return prepare(options)


def _fetch(tasks: Tasks) -> None:
    """See before the run that the tasks' data can be had."""
    from auto_round.evaluate.task_data import fetch_data

    quiet_harness()
    with redirect_stdout(sys.stderr):
        fetch_data(tasks)


def _evaluate(tasks: Tasks, folder: Path, model: ModelOptions) -> None:
    """Run the last folder on tasks; the figures are printed, and written beside it."""
    from auto_round.evaluate.evaluation import evaluate_output, write_json

    quiet_harness()
    with redirect_stdout(sys.stderr):  # the harness prints
        found = evaluate_output(tasks, folder, model)
    beside = folder.with_name(folder.name + EVALUATION_SUFFIX)
    write_json(found, beside)
    print(f"\n{evaluated(found)}\n\nwritten     {beside}")


def _runs(options: Options) -> list[Options]:
    """The runs of a request; where schemes are to be chosen, that is done here, also for a dry run."""
    from auto_round.pipeline.separate_runs import runs_of

    if not options.auto.asked:
        return list(runs_of(options))
    from auto_round.autoscheme.runs import choose_schemes

    quiet_transformers()
    try:
        with drawn_progress() as progress:
            chosen = choose_schemes(options, progress)
    except KeyboardInterrupt:
        logger.warning("the same command does not measure again what was measured")
        raise
    return [part for wanted in chosen for part in runs_of(wanted)]


def quiet_transformers() -> None:
    """Keep Transformers' own bars and advice out of the output, and a remark of PyTorch's compiler.

    Their errors still come through. The compiler remarks that scales in fp16 meet weights in bfloat16 in one
    of its kernels, which they do on purpose.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed", category=UserWarning)


def quiet_harness() -> None:
    """Keep the harness's advice to those who call it from Python out of the output."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def set_threads(wanted: int | None) -> None:
    """As many CPU threads as the user wants, else no more than there are cores.

    PyTorch counts those of the machine, also in a container that has few of them.
    """
    import torch

    from auto_round.pipeline.machine.limits import usable_cores

    threads = min(torch.get_num_threads(), usable_cores()) if wanted is None else wanted
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
