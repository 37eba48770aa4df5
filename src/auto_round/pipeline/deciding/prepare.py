"""From options to a job, in four steps; each refuses what it can know to be wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from auto_round.config.options import Options
from auto_round.facts.layer import Role
from auto_round.log import logger
from auto_round.pipeline.deciding.decide import Decided, decide
from auto_round.pipeline.deciding.fetch_rows import Data, fetch_rows
from auto_round.pipeline.deciding.fit import fitted
from auto_round.pipeline.deciding.idle_options import Settled, idle_options
from auto_round.pipeline.deciding.image_rows import first_with_images
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.open_model import Opened, open_model, refuse_outputs
from auto_round.pipeline.deciding.request import Request, make_request
from auto_round.pipeline.deciding.smoothing import refuse_smoothing
from auto_round.pipeline.machine.default_device import plain_device
from auto_round.pipeline.machine.memory import keep_few_products


@plain_device()
def prepare(
    options: Options,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    dataset: Any = None,
    output: Path | None = None,
    rows: bool = True,
) -> Job:
    """Decide everything that can be decided without reading weights.

    Args:
        options: what the user asked for.
        model: a model in memory instead of `options.model.model`.
        tokenizer: its tokenizer, an object; None to load it from the model's folder.
        processor: its processor for images, an object; None to load it when it is needed.
        dataset: calibration data as Python objects instead of `options.calibration.dataset`.
        output: final folder; None for `options.output.output_dir`.
        rows: fetch the calibration rows; a dry run does without.

    Raises:
        AutoRoundError: anything that would make the run fail later, as far as it can be known.
    """
    request = make_request(options, dataset=dataset, output=output)
    opened = open_model(request, model=model, tokenizer=tokenizer, processor=processor, dry=not rows)
    if rows:  # a dry run tells it beside the rest
        refuse_outputs(opened, [request.output])
    decided = decide(request, opened)
    keep_few_products(request.device, decided.dtype)
    opened = replace(opened, options=replace(opened.options, tune=decided.wanted))
    data = fetch_rows(opened, decided, request.device, dataset=dataset, dry=not rows)
    job = replace(put_together(request, opened, decided, data), processor=processor)
    settled = Settled(
        options=request.options,
        tune=job.tune,
        exporters=job.exporters.values(),
        rounds=bool(job.plan.quantized) or job.caches is not None,
        has_rows=job.rows is not None,
        has_images=first_with_images(job.all_rows) is not None,
        has_experts=any(layer.role is Role.EXPERT for layer in job.source.layers),
        quantizes_inputs=job.plan.scheme.act_quantized,
        on_cpu=job.device.type == "cpu",
        folder=job.source.folder,
    )
    for note in idle_options(settled):
        logger.warning(note)
    refuse_smoothing(job)
    return fitted(job)


def put_together(request: Request, opened: Opened, decided: Decided, data: Data) -> Job:
    """The job that the four steps came to."""
    return Job(
        options=opened.options,
        source=opened.source,
        tokenizer=opened.tokenizer,
        plan=decided.plan,
        exporters=decided.exporters,
        rows=data.rows,
        tuned=data.tuned,
        more_rows=data.more,
        tune=decided.tune,
        device=request.device,
        dtype=data.dtype or decided.dtype,
        output=request.output,
        importance=decided.importance,
        caches=decided.caches,
        fresh=data.fresh,
        placement=decided.placement,
        free=request.devices.free,
    )
