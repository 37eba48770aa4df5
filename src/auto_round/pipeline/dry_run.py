"""Dry run: everything that can be said about a run before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.checkpoint.workfolder import refuse_occupied
from auto_round.config.options import Options
from auto_round.errors import ConfigError
from auto_round.facts.tensor import dtype_name
from auto_round.pipeline.deciding.fetch_rows import fresh_rows
from auto_round.pipeline.deciding.fit import plan_memory, workload
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.method import method_of
from auto_round.pipeline.deciding.placement import place_layers
from auto_round.pipeline.deciding.plan_table import plan_table
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.deciding.smoothing import wanted_strength
from auto_round.pipeline.disk_need import DiskNeed, disk_need, free_bytes
from auto_round.pipeline.estimate import Rates, RunEstimate, estimate, measure_rates
from auto_round.pipeline.fitting.accelerators import Machines, read_machines
from auto_round.pipeline.fitting.paper import Paper, on_paper
from auto_round.pipeline.fitting.plan import MemoryPlan
from auto_round.pipeline.fitting.work import Workload
from auto_round.pipeline.machine.default_device import plain_device
from auto_round.pipeline.machine.device import Devices
from auto_round.pipeline.machine.memory import available_bytes
from auto_round.units import rough_duration, size


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do.

    Attributes:
        job: the prepared run; without calibration rows.
        table: the plan for people.
        memory: what the run needs where.
        paper: what it would take on other machines; None where none were named.
        rates: measured speed of the device.
        estimate: memory and time.
        disk: what the run writes.
        available_bytes: host memory that is free now; 0 where the system does not tell.
        free_bytes: free space on the disk of the output.
        blocked: why the output folder cannot be written; empty when it can.
        unfinished: partial folder of an interrupted run there; None when there is none.
    """

    job: Job
    table: str
    memory: MemoryPlan
    paper: Paper | None
    rates: Rates
    estimate: RunEstimate
    disk: DiskNeed
    available_bytes: int
    free_bytes: int
    blocked: str
    unfinished: Path | None

    @property
    def text(self) -> str:
        """All of it for people, a few lines after the table."""
        expected = self.estimate
        lines = [self.table, ""]
        if self.job.options.chosen is not None:
            lines += [f"chosen:  {self.job.options.chosen['reached']}"]
        lines += [f"method:  {_method(self.job)}", f"device:  {_device(self.job)}"]
        memory = f"memory:  about {size(expected.host_bytes)} at the peak"
        if self.available_bytes:
            memory += f", {size(self.available_bytes)} available"
        if expected.device_bytes:
            memory += f"; on {self.job.device} about {size(expected.device_bytes)}"
        lines += [memory + ("" if self.memory.fits else ": TOO LITTLE"), f"         {self.memory.level.text}"]
        lines += [self.memory.table]
        disk = self.disk
        lines += [
            f"disk:    {size(disk.total)} ({disk.parts}), {size(self.free_bytes)} free"
            + _too_little(disk.total, self.free_bytes)
        ]
        rate = f"{self.rates.operations / 1e9:.3g} billion operations per second, measured now"
        lines += [f"time:    about {rough_duration(expected.seconds)}, a rough estimate from {rate}"]
        if expected.together:
            options, scratch = self.job.options, size(self.disk.together)
            lines += [
                f"of it:   about {rough_duration(expected.together)} and {scratch} of the disk for "
                f"{options.tune.distill_steps} steps of all blocks together, on {fresh_rows(options)} rows "
                "of their own"
            ]
        if self.paper is not None:
            lines += ["", self.paper.text, ""]
        lines += [f"output:  {', '.join(map(str, self.job.folders(self.job.output).values()))}"]
        if self.unfinished is not None:
            lines += [f"         an unfinished run lies in {self.unfinished}: the same command continues it"]
        if self.blocked:
            lines += [f"         would be refused: {self.blocked}"]
        return "\n".join(lines)


@plain_device()
def dry_run(
    options: Options, *, model: nn.Module | None = None, tokenizer: Any = None, dataset: Any = None
) -> DryRun:
    """Say what a run with these arguments would do; nothing is written and no calibration data fetched.

    Args:
        options: what to do.
        model: a model in memory instead of the one that `options` names.
        tokenizer: tokenizer object; None to load it.
        dataset: calibration data as Python objects instead of the named data set.

    Raises:
        AutoRoundError: the run itself would be refused, except for its output folder: that is reported.
    """
    machines = read_machines(options.model.device_map)
    if machines is not None:  # whatever this machine has, it is not what is asked about
        options = replace(options, model=replace(options.model, device_map="cpu"))
    job = prepare(options, model=model, tokenizer=tokenizer, dataset=dataset, rows=False)
    work = workload(job)
    memory = job.memory_plan or plan_memory(job)
    rates = measure_rates(work)
    out = job.output.expanduser().resolve()
    partial = out.with_name(out.name + ".partial")
    blocked = ""
    try:
        refuse_occupied(out, overwrite=options.output.overwrite, source=job.source.folder)
    except ConfigError as error:
        blocked = str(error)
    return DryRun(
        job=job,
        table=plan_table(job),
        memory=memory,
        paper=None if machines is None else _on_paper(job, work, machines),
        rates=rates,
        estimate=estimate(work, memory, rates),
        disk=disk_need(work, memory),
        available_bytes=available_bytes(),
        free_bytes=free_bytes(out),
        blocked=blocked,
        unfinished=partial if partial.is_dir() else None,
    )


def _on_paper(job: Job, work: Workload, machines: Machines) -> Paper:
    """The run on machines that are not at hand."""

    def spread(count: int) -> dict[str, torch.device]:
        devices = [torch.device("cuda", i) for i in range(count)]
        placement = place_layers(Devices(devices[0], tuple(devices[1:])), job.source, job.plan)
        placed = {layer.name: placement.of(layer) for layer in job.source.layers}
        return {name: device for name, device in placed.items() if device != devices[0]}

    def seconds(there: Workload, plan: MemoryPlan, operations: float, bandwidth: float) -> float:
        return estimate(there, plan, Rates(operations, bandwidth)).seconds

    return on_paper(work, machines, spread, seconds)


def _method(job: Job) -> str:
    """The method as the report will say it, and the data that it needs: none of them is fetched yet."""
    rows = job.tune.needs_rows and not job.importance
    method = method_of(job.options, job.tune, with_rows=rows, strength=wanted_strength(job))
    if not rows:
        return method.sentence
    wanted = job.options.calibration
    return f"{method.sentence}; {wanted.nsamples} rows of {wanted.seqlen} tokens from {method.dataset}"


def _device(job: Job) -> str:
    return f"{job.device}, blocks run in {dtype_name(job.dtype)}"


def _too_little(needed: int, there: int) -> str:
    return ": TOO LITTLE" if there and needed > there else ""
