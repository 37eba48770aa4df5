"""How a decided job fits into the memory that is there."""

from __future__ import annotations

from dataclasses import replace

import torch

from auto_round.log import logger
from auto_round.pipeline.deciding.activations import activation_formats
from auto_round.pipeline.deciding.compiling import tuning_steps
from auto_round.pipeline.deciding.fetch_rows import held_out_rows
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.placement import place_layers
from auto_round.pipeline.deciding.plan_table import manifests
from auto_round.pipeline.deciding.smoothing import wanted_strength
from auto_round.pipeline.fitting.choose import Room, choose_plan
from auto_round.pipeline.fitting.plan import MemoryPlan
from auto_round.pipeline.fitting.work import Workload
from auto_round.pipeline.machine.device import Devices
from auto_round.pipeline.machine.memory import available_bytes, device_total_bytes, resident_bytes
from auto_round.tuning.distill import distill_settings


def fitted(job: Job) -> Job:
    """The job with its memory plan, and with as many rows at once as the plan says."""
    job = _arranged(job)
    plan = plan_memory(job)
    logger.info("memory: %s", plan.line)
    if not plan.fits:
        logger.warning(
            "this run may need more memory than there is: %s. Less is needed with --memory low or lowest, "
            "fewer or shorter rows (--nsamples, --seqlen)",
            plan.line,
        )
    return replace(job, memory_plan=plan, tune=replace(job.tune, rows_at_once=plan.level.rows))


def _arranged(job: Job) -> Job:
    """What further accelerators do that the run may use, and where targets are computed ahead.

    A block that fits one accelerator stays there: products in pieces wait for each other. The next one then
    computes targets. Else the matrices of each block are spread over all.
    """
    if job.free and not job.options.tune.distill_steps:  # all blocks learn together on one device
        alone = plan_memory(job)
        if not alone.fits or alone.level.rounds_again:
            return replace(job, placement=place_layers(Devices(job.device, job.free), job.source, job.plan))
    wanted = job.memory.targets_ahead
    at = job.free[0] if job.free else job.device if wanted == "on" else None
    if at is None or wanted == "off" or not job.tune.needs_rows:
        return job
    ahead = replace(job, ahead=at)
    plan = plan_memory(ahead)
    if plan.fits and not plan.files and job.caches is None:
        return ahead
    if wanted == "on":
        why = "attention states are calibrated" if job.caches is not None else "memory is too small for them"
        logger.warning("targets are not computed ahead: %s", why)
    return job


def plan_memory(job: Job) -> MemoryPlan:
    """What the job needs where, and the level at which it begins."""
    room = Room(resident_bytes(), available_bytes(), device_total_bytes(job.device))
    return choose_plan(workload(job), room)


def workload(job: Job) -> Workload:
    """What the cost of a run follows from; rows that are not fetched yet are counted."""
    calibration, output, asked = job.options.calibration, job.options.output, job.options.tune
    held_out, steps = held_out_rows(calibration.nsamples), tuning_steps(job)
    rows = 0
    if job.rows is not None:
        rows = len(job.rows.rows)
    elif job.tune.needs_rows and not job.importance:
        rows = calibration.nsamples + held_out
    return Workload(
        source=job.source,
        tune=job.tune,
        device=job.device,
        dtype=job.dtype,
        memory=job.memory,
        rows=rows,
        held_out=held_out,
        seqlen=calibration.seqlen,
        nblocks=asked.nblocks,
        by_predictions=asked.enable_alg_ext,
        reloads=output.verify,
        continues=output.resume,
        formats={name: fmt for name, (_, fmt) in job.quantized().items()},
        output_bytes=sum(m.nbytes for m in manifests(job).values()),
        elsewhere=_elsewhere(job),
        ahead=job.ahead,
        compiled=steps is not None and steps.compiled,
        rounds_inputs=bool(activation_formats(job.plan, job.source.layers)),
        smooths=job.tune.needs_rows and wanted_strength(job) > 0,
        together=distill_settings(asked, calibration.seed) if asked.distill_steps else None,
    )


def _elsewhere(job: Job) -> dict[str, torch.device]:
    """Layer -> its device, where that is not the main one."""
    placed = {} if job.placement is None else {a.name: job.device_of(a) for a in job.source.layers}
    return {name: device for name, device in placed.items() if device != job.device}
