"""Plain rounding by several processes: only the first prepares the run, and tells the others what they need.

To build a model's skeleton and plan takes several times as long as to round a small model, and needs most of
Transformers, which takes even longer to import. Who rounds matrices needs the weight files and the
first one's `Rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from auto_round.checkpoint.header import read_object
from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.tensors import read_matrix
from auto_round.config.options import Options
from auto_round.models.fingerprint import files_fingerprint, model_fingerprint
from auto_round.models.hub import resolve_model
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.machine.default_device import plain_device
from auto_round.pipeline.machine.device import choose_device
from auto_round.pipeline.plain_rounding import PlainRounding, Rules, help_rounding
from auto_round.pipeline.processes import refuse_differences, shared
from auto_round.pipeline.writing.signature import arithmetic
from auto_round.ranks.ranks import Ranks
from auto_round.stored.unpacked import Unpacked, open_plain


def prepared(options: Options, ranks: Ranks, prepare: Callable[[Options], Job]) -> Job | PlainRounding:
    """A run prepared by all of its processes, or plain rounding prepared by the first one.

    Args:
        options: what the user asked for, here.
        ranks: who does it.
        prepare: prepares the run; may import what is slow to import.

    Returns:
        The job; where this process only has to round, how.

    Raises:
        AutoRoundError: what preparing raises, or the processes differ.
    """
    if ranks.size == 1 or not _asks_plain(options):
        return shared(prepare(options), ranks)
    if ranks.rank:
        told: Rules | None = ranks.first(None)
        return shared(prepare(options), ranks) if told is None else _as_told(told, options, ranks)
    telling = None
    try:
        job = prepare(options)
        telling = _telling(job)
    finally:
        ranks.first(telling)  # told nothing, the others prepare the run, too, and meet the same errors
    if telling is None:
        return shared(job, ranks)
    _refuse_others(ranks, job.device, model_fingerprint(job.source))
    return replace(job, ranks=ranks)


@plain_device()
def follow(rounding: PlainRounding, ranks: Ranks) -> None:
    """What a process does that only rounds: its part of the work, then wait until all of it is written."""
    if ranks.first(None) is not None:
        help_rounding(rounding, ranks)
    ranks.first(None)


def _asks_plain(options: Options) -> bool:
    """Whether the options ask for plain rounding of a model, which may turn out to need rows all the same."""
    return options.tune.iters == 0 and options.tune.disable_opt_rtn is True


def _telling(job: Job) -> Rules | None:
    """What to tell the others; None where they need the model, or several devices each."""
    several = job.placement is not None and job.placement.several
    if job.rows is not None or several or not isinstance(job.source.files, (Checkpoint, Unpacked)):
        return None
    return Rules.of(job)


def _as_told(told: Rules, options: Options, ranks: Ranks) -> PlainRounding:
    """Rounding of the model that the options name, as the first process says.

    Raises:
        ConfigError: the model or the machine is another one here.
    """
    device = choose_device(options.model.device_map)
    trust = options.model.trust_remote_code
    folder = resolve_model(options.model.model, platform=options.model.platform, trust_remote_code=trust)
    files = open_plain(Checkpoint.open(folder), read_object(folder / "config.json"))
    _refuse_others(ranks, device, files_fingerprint(files))
    return PlainRounding(
        rules=told,
        read=lambda layer: read_matrix(layer, files.read, files.read_entry),
        device_of=lambda layer: device,
        device=device,
    )


def _refuse_others(ranks: Ranks, device: torch.device, model: str) -> None:
    """Compare what a process is not told: its machine, and the model that it finds.

    Raises:
        ConfigError: one has something else than the first.
    """
    refuse_differences(ranks, "model or machine", arithmetic(device) | {"model": model})
