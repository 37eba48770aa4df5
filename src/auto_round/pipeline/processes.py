"""A run by several processes: what is settled among them before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from auto_round.calibration.rows import CalibrationRows
from auto_round.checkpoint.journal import flattened, shown
from auto_round.config.option import settings
from auto_round.config.options import GROUPS, Options
from auto_round.errors import ConfigError
from auto_round.log import logger
from auto_round.numerics.smoothing import Rescaling
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.machine.device import choose_device, device_of_rank
from auto_round.pipeline.writing.signature import signature
from auto_round.ranks.place import place
from auto_round.ranks.ranks import ALONE, Ranks
from auto_round.ranks.start import check_backend, join
from auto_round.tuning.steps import batch_rows

_ADDRESS = re.compile(" at 0x[0-9a-f]+")
_LISTED = 5
"""Most differences that an error names."""


class Begun(NamedTuple):
    """What the first process tells the others as it begins.

    Attributes:
        entries: of its journal.
        scratch: folder for what only this run needs, which others may not see.
        rows: calibration rows, where they are not those that all have prepared.
        tuned: how many of them are tuned on.
        changes: tensor on disk -> how the model is rescaled; empty where it is as it was.
    """

    entries: list[dict[str, Any]]
    scratch: Path
    rows: CalibrationRows | None
    tuned: int
    changes: Mapping[str, Rescaling]


@contextmanager
def joined(options: Options) -> Iterator[tuple[Ranks, Options]]:
    """The processes of a run, and the options of this one: on a machine with accelerators each has its own.

    Args:
        options: what the user asked for, here.

    Raises:
        ConfigError: there is no such backend, or the processes were asked for different things.
        RankError: the others do not come.
    """
    here = place()
    check_backend(options.model.dist_backend)
    if here is None:
        yield ALONE, options
        return
    wanted = device_of_rank(options.model.device_map, here.local, here.beside)
    own = replace(options, model=replace(options.model, device_map=wanted))
    with join(options.model.dist_backend, choose_device(wanted)) as ranks:
        refuse_differences(ranks, "options", _settings(options))
        yield ranks, own


def chosen(options: Options, ranks: Ranks, choose: Callable[[Options], Sequence[Options]]) -> list[Options]:
    """What `choose` makes of a request: where that takes measurements, the first process does it for all."""
    if ranks.size == 1 or not options.auto.asked:
        return list(choose(options))
    found = ranks.first([] if ranks.rank else list(choose(options)))
    own = options.model.device_map
    return [replace(each, model=replace(each.model, device_map=own)) for each in found]


def shared(job: Job, ranks: Ranks) -> Job:
    """A job that several processes do together; all of them have prepared the same one.

    Raises:
        ConfigError: they have prepared different ones, or there are more of them than rows.
    """
    if ranks.size == 1:
        return job
    refuse_differences(ranks, "settings, data or machine", signature(job))
    if job.rows is None:
        return replace(job, ranks=ranks)
    if job.tuned and ranks.size > job.tuned:
        raise ConfigError(
            f"{ranks.size} processes cannot divide {job.tuned} calibration rows among them: start at most "
            f"{job.tuned}, or give more rows (--nsamples)"
        )
    first = min(batch_rows(job.tune, 0), job.tuned) * job.tune.accumulate if job.tune.iters else ranks.size
    if first < ranks.size and not ranks.rank:
        logger.warning(
            "the first steps have %d rows, and there are %d processes: some have nothing to do there "
            "(a larger --batch_size would give each a row)",
            *(first, ranks.size),
        )
    return replace(job, ranks=ranks)


def _settings(options: Options) -> dict[str, Any]:
    """Every option by its name; functions, which have no value to compare, are left out."""
    values = {
        each.name: getattr(getattr(options, key), each.name)
        for key, group in GROUPS.items()
        for each in settings(group)
    }
    return {name: _ADDRESS.sub("", repr(value)) for name, value in values.items() if not callable(value)}


def refuse_differences(ranks: Ranks, what: str, own: Mapping[str, Any]) -> None:
    """Compare what all processes have; each of them says the same.

    Args:
        ranks: all of them.
        what: what it is, for the error.
        own: what this one has, as JSON values.

    Raises:
        ConfigError: one has something else than the first; names it and what differs.
    """
    found = [flattened(json.loads(json.dumps(each))) for each in ranks.objects(dict(own))]
    for rank, each in enumerate(found):
        keys = [key for key in {**found[0], **each} if found[0].get(key) != each.get(key)]
        if keys:
            lines = [f"{key}: {shown(found[0].get(key))} there, {shown(each.get(key))} here" for key in keys]
            more = [f"{len(keys) - _LISTED} more"] if len(keys) > _LISTED else []
            message = f"rank {rank} has other {what} than rank 0:"
            remedy = "start all processes with the same command, on machines of one kind"
            raise ConfigError("\n  - ".join([message, *lines[:_LISTED], *more]) + f"\n{remedy}")
