"""Rows are added to the calibration data until each expert saw enough tokens; routing is never changed.

Which experts a row reaches is known once the blocks before have run, so the unquantized model is run over the
rows that are there, and over as many more, and more, until every expert is served or the data end. Of the
further rows only those are taken that bring tokens to an expert that lacks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from auto_round.calibration.observe_experts import observe_experts
from auto_round.calibration.row import CalibrationRow, fingerprint, of_one_length
from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.facts.layer import Role
from auto_round.log import logger
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.running.original import OriginalBlock, original_blocks

Tokens = Mapping[str, Tensor]
"""Module of experts -> tokens of each expert in each row, `[rows, n_experts] int64`."""

_CHOSEN, _LOADED = "chosen", "loaded"


def cover_experts(job: Job, scratch: Path) -> Job:
    """The run with so many more rows that each expert sees as many tokens as the user asked for.

    The choice is kept in `scratch`: a run that is continued goes on with the same rows.

    Args:
        job: the run.
        scratch: folder of the run.
    """
    wanted = job.options.calibration.expert_rows
    has_experts = any(layer.role is Role.EXPERT for layer in job.source.layers)
    if job.rows is None or not wanted or not has_experts:
        return job
    if job.more_rows is None:
        logger.warning("expert_rows adds none: the calibration data can be read only once")
        return job
    kept = scratch / "expert_rows.safetensors"
    if kept.exists():
        saved = load_tensors(kept)
        loaded, chosen = int(saved[_LOADED]), saved[_CHOSEN].tolist()
    else:
        loaded, chosen = _choose(job, scratch, wanted)
        numbers = {_LOADED: loaded, _CHOSEN: chosen}
        save_tensors(kept, {n: torch.tensor(v, dtype=torch.int64, device="cpu") for n, v in numbers.items()})
    return _with_rows(job, [_fresh(job, loaded)[number] for number in chosen]) if chosen else job


def _choose(job: Job, scratch: Path, wanted: int) -> tuple[int, list[int]]:
    """Rows loaded in the end, and numbers of those taken among the new ones."""
    rows = job.all_rows
    lacking = {
        name: (wanted - counts.sum(0)).clamp_min(0)
        for name, counts in _route(job, rows[: job.tuned], scratch).items()
    }
    loaded, looked_at, chosen = len(rows), 0, list[int]()
    while any(bool(left.any()) for left in lacking.values()):
        loaded *= 2
        fresh = _fresh(job, loaded)[looked_at:]
        if not fresh:
            break
        found = _route(job, fresh, scratch)
        for number in range(len(fresh)):
            brought = {name: counts[number] for name, counts in found.items()}
            if any(bool((brought[name] * left).any()) for name, left in lacking.items()):
                chosen.append(looked_at + number)
                lacking = {n: (left - brought[n]).clamp_min(0) for n, left in lacking.items()}
        looked_at += len(fresh)
        short = sum(int((left > 0).sum()) for left in lacking.values())
        logger.info(
            "%d rows added for the experts, of %d looked at; %d experts lack tokens",
            len(chosen),
            looked_at,
            short,
        )
    return loaded, chosen


def _fresh(job: Job, count: int) -> list[CalibrationRow]:
    """Rows that the run does not have yet, of so many rows of its data."""
    if job.more_rows is None:
        return []
    known = {row.identity for row in (*job.all_rows, *job.fresh)}
    return [row for row in job.more_rows(count).rows if row.identity not in known]


def _with_rows(job: Job, added: Sequence[CalibrationRow]) -> Job:
    """The run with more rows to tune on."""
    if job.rows is None:
        return job
    padding = getattr(job.tokenizer, "pad_token_id", None) or 0
    rows = of_one_length((*job.all_rows[: job.tuned], *added, *job.held_out), padding)
    summary = f"{job.rows.summary}; {len(added)} rows more for the experts"
    together = replace(job.rows, rows=rows, fingerprint=fingerprint(rows), summary=summary)
    return replace(job, rows=together, tuned=job.tuned + len(added))


def _route(job: Job, rows: Sequence[CalibrationRow], scratch: Path) -> dict[str, Tensor]:
    """Tokens that each row sends to each expert, by running the unquantized model block by block."""
    found: dict[str, Tensor] = {}
    for here in original_blocks(job.on_rows(rows), scratch):
        for name, counts in _run(here):
            found[f"{here.block.module}.{name.removeprefix('0.')}"] = counts
    return {name: counts for name, counts in found.items() if counts.any()}


def _run(here: OriginalBlock) -> Iterator[tuple[str, Tensor]]:
    """Run a block over all rows, one at a time; tokens of its experts by row."""
    masks = here.masks
    counts: dict[str, list[Tensor]] = {}
    for row in range(here.streams.rows):
        mask = None if masks is None else partial(masks.__getitem__, [row])
        with observe_experts(here.group, mask) as seen:
            here.run(range(row, row + 1))
        for name, tokens in seen.tokens.items():
            counts.setdefault(name, []).append(tokens)
    yield from ((name, torch.stack(each)) for name, each in counts.items())
