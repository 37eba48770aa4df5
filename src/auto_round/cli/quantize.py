"""The main command: options in, a quantized model on disk and a summary out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from auto_round.cli.folder import with_named_folder
from auto_round.cli.progress import drawn_progress
from auto_round.cli.summary import summary
from auto_round.config import Options, build_options, read_environment
from auto_round.log import logger


def quantize(given: Mapping[str, Any], recipe: str) -> None:
    """Do what the options say and print what came of it.

    Raises:
        AutoRoundError: the request is wrong, or the work failed.
    """
    environment = read_environment()
    options = with_named_folder(build_options(given, recipe, environment))
    set_threads(environment.num_threads)
    if options.output.dry_run:
        from auto_round.pipeline.plan_run import dry_run

        print("\n\n".join(dry_run(part).text for part in _runs(options)))
        return
    from auto_round.pipeline.deciding.prepare import prepare
    from auto_round.pipeline.machine.clock import Clock
    from auto_round.pipeline.quantize import run_job

    quiet_transformers()
    clock = Clock()
    jobs = [prepare(part) for part in _runs(options)]
    for job in jobs:
        try:
            with drawn_progress() as progress:
                result = run_job(job, progress, clock)
        except KeyboardInterrupt:
            if job.options.output.resume:
                logger.warning("the same command continues where this run stopped (%s.partial)", job.output)
            raise
        print(summary(result))
        clock = Clock()


def _runs(options: Options) -> list[Options]:
    """The runs of a request; where schemes are to be chosen, that is done here, also for a dry run."""
    from auto_round.pipeline.several import runs_of

    if not options.auto.asked:
        return list(runs_of(options))
    from auto_round.autoscheme.runs import choose_schemes

    quiet_transformers()
    with drawn_progress() as progress:
        chosen = choose_schemes(options, progress)
    return [part for wanted in chosen for part in runs_of(wanted)]


def quiet_transformers() -> None:
    """Keep Transformers' own bars and advice out of the output; its errors still come through."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")


def set_threads(wanted: int | None) -> None:
    """As many CPU threads as the user wants, else no more than there are cores.

    PyTorch counts those of the machine, also in a container that has few of them.
    """
    import torch

    from auto_round.pipeline.machine.limits import usable_cores

    threads = min(torch.get_num_threads(), usable_cores()) if wanted is None else wanted
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
