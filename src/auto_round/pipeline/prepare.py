"""From options to a job: open the model, make the plan, ask for refusals, fetch the calibration rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from auto_round.calibration.registry import Platform
from auto_round.calibration.rows import CalibrationRows, load_rows
from auto_round.config.groups import CalibrationOptions
from auto_round.config.options import Options
from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.export.exporter import Exporter
from auto_round.export.table import notes, parse_formats, refusals, scale_dtype
from auto_round.log import logger
from auto_round.models.folder import FolderSource
from auto_round.models.hub import resolve_model
from auto_round.models.live import LiveSource
from auto_round.models.source import ModelSource
from auto_round.pipeline.activations import refuse_unreachable
from auto_round.pipeline.default_device import plain_device
from auto_round.pipeline.device import choose_device, compute_dtype, rows_at_once, warn_of_threads
from auto_round.pipeline.early import refuse_early
from auto_round.pipeline.effects import idle_options
from auto_round.pipeline.gguf import prepare_gguf
from auto_round.pipeline.gguf_imatrix import check_save_imatrix
from auto_round.pipeline.gguf_request import gguf_request
from auto_round.pipeline.job import Job
from auto_round.pipeline.recast import named_dtype
from auto_round.pipeline.settings import plan_request, tune_settings
from auto_round.pipeline.unaddressed import refuse_nothing, with_unaddressed, without_kept
from auto_round.schemes.gguf_types import TYPES
from auto_round.schemes.make import make_plan
from auto_round.schemes.plan import Plan
from auto_round.tuning.config import TuneConfig

HELD_OUT = 8
"""Rows beyond those tuned on: they choose the step that is kept, and measure the result."""


@plain_device()
def prepare(
    options: Options,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    dataset: Any = None,
    output: Path | None = None,
    rows: bool = True,
) -> Job:
    """Decide everything that can be decided without reading weights.

    Args:
        options: what the user asked for.
        model: a model in memory instead of `options.model.model`.
        tokenizer: its tokenizer, an object; None to load it from the model's folder.
        dataset: calibration data as Python objects instead of `options.calibration.dataset`.
        output: final folder; None for `options.output.output_dir`.
        rows: fetch the calibration rows; a dry run does without.

    Raises:
        AutoRoundError: anything that would make the run fail later, as far as it can be known.
    """
    device = choose_device(options.model.device_map)  # before anything is fetched
    warn_of_threads(device)
    where = output or Path(options.output.output_dir)
    gguf = gguf_request(options)
    options = options if gguf is None else gguf.options
    refuse_early(options, dataset=dataset, output=where, gguf=gguf is not None)
    source = _open_source(options, model)
    importance: Mapping[str, Tensor] = {}
    if gguf is None:
        asked = parse_formats(",".join(options.output.formats))
        plan = _plan(options, source, asked)
        exporters = _exporters(asked, plan, source)
    else:
        if tokenizer is None and options.output.gguf_template is None:
            tokenizer = _load_tokenizer(options, source, required=True)
        steered = needs_rows(tune_settings(options.tune, TYPES[gguf.wanted.base].bits))
        plan, exporters, importance = prepare_gguf(gguf, source, tokenizer, imatrix=steered)
    schemes = [plan.scheme_of(name) for name in plan.quantized]
    tune = tune_settings(options.tune, min((s.bits for s in schemes if s is not None), default=16))
    check_save_imatrix(options, where, calibrated=needs_rows(tune))
    if tokenizer is None and (options.model.tokenizer or source.folder is not None):
        tokenizer = _load_tokenizer(
            options, source, required=rows and needs_rows(tune) and dataset is None and not importance
        )
    options = _within_context(options, source)
    calibration, tuned = (None, 0)
    if not importance and _runs_by_blocks(options, tune, source, dataset) and rows:
        calibration, tuned = _rows(options, tune, tokenizer, dataset)
        if calibration is not None:
            _refuse_unknown_tokens(calibration, source)
    at_once = rows_at_once(device, options.calibration.seqlen, sparing=options.memory.low_gpu_mem_usage)
    job = Job(
        options=options,
        source=source,
        tokenizer=tokenizer,
        plan=plan,
        exporters=exporters,
        rows=calibration,
        tuned=tuned,
        tune=replace(tune, rows_at_once=at_once),
        device=device,
        dtype=compute_dtype(
            named_dtype(options.model.model_dtype) or source.dtype, device, amp=options.tune.amp
        ),
        output=where,
        importance=importance,
    )
    for note in idle_options(job):
        logger.warning(note)
    return job


def held_out_rows(nsamples: int) -> int:
    """Rows held out beside `nsamples` tuned ones: an eighth of them, but 2 to `HELD_OUT`."""
    return min(HELD_OUT, max(2, nsamples // 8))


def needs_rows(tune: TuneConfig) -> bool:
    """Tuning and the weighted search need calibration rows, plain rounding does not."""
    return tune.iters > 0 or tune.search


def _open_source(options: Options, model: nn.Module | None) -> ModelSource:
    if model is not None:
        return LiveSource(model)
    if not options.model.model:
        raise ConfigError("no model given: name a folder or a hub id, for example --model Qwen/Qwen3-0.6B")
    folder = resolve_model(options.model.model, platform=options.model.platform)
    return FolderSource.open(
        folder,
        trust_remote_code=options.model.trust_remote_code,
        dtype=named_dtype(options.model.model_dtype),
    )


def _plan(options: Options, source: ModelSource, asked: Sequence[Exporter]) -> Plan:
    request = plan_request(options.scheme, scale_dtype(asked, source.dtype))
    others = {name.rpartition(".")[0] for name in source.tensors}
    make = partial(
        make_plan,
        source.layers,
        blocks=source.blocks,
        tied_head=source.tied_head,
        other_names=sorted(others),
    )
    plan = make(request)
    if objections := _objections(asked, plan, source):
        uniform = make(replace(request, one_group_size=True))
        plan = uniform if _objections(asked, uniform, source) < objections else plan
    plan = without_kept(with_unaddressed(plan, source), source.layers, asked)
    for warning in plan.warnings:
        logger.warning(warning)
    refuse_nothing(plan, source)
    refuse_unreachable(plan, source.layers)
    return plan


def _refused(asked: Sequence[Exporter], plan: Plan, source: ModelSource) -> list[Refusal]:
    return [r for e in asked for r in refusals(e, plan, source.layers)]


def _objections(asked: Sequence[Exporter], plan: Plan, source: ModelSource) -> int:
    """How much formats and their readers have against a plan."""
    return len(_refused(asked, plan, source)) + sum(len(notes(e, plan, source.layers)) for e in asked)


def _exporters(asked: Sequence[Exporter], plan: Plan, source: ModelSource) -> dict[str, Exporter]:
    """Format name -> exporter with its variant decided.

    Raises:
        UnsupportedError: a format cannot hold the plan; names those that can.
    """
    refused = _refused(asked, plan, source)
    if refused:
        others = [e.name for e in asked if all(r.who != e.name for r in refused)]
        alone = f"; {', '.join(others)} can: run once for each format that is left" if others else ""
        raise UnsupportedError(f"this plan cannot be written as asked{alone}", refused)
    for exporter in asked:
        for note in notes(exporter, plan, source.layers):
            logger.warning(note)
    return {e.name: e.for_plan(plan, source.layers) for e in asked}


def _load_tokenizer(options: Options, source: ModelSource, *, required: bool) -> Any:
    from transformers import AutoTokenizer

    where = options.model.tokenizer or str(source.folder)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=options.model.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not required and options.model.tokenizer is None:
            return None
        raise ConfigError(f"no tokenizer in {where} ({error}): name one with --tokenizer") from error


def _rows(
    options: Options, tune: TuneConfig, tokenizer: Any, dataset: Any
) -> tuple[CalibrationRows | None, int]:
    """Rows to tune on and, behind them, rows to hold out."""
    wanted = options.calibration
    data = wanted.dataset if dataset is None else dataset
    platform: Platform = "model_scope" if options.model.platform == "model_scope" else "hf"
    load = partial(load_rows, data, tokenizer, seqlen=wanted.seqlen, seed=wanted.seed, platform=platform)
    if not needs_rows(tune):
        if dataset is None and wanted.dataset == CalibrationOptions().dataset:
            return None, 0
        return load(nsamples=HELD_OUT), 0
    beside = held_out_rows(wanted.nsamples)
    rows = load(nsamples=wanted.nsamples + beside)
    count = len(rows.rows)
    if count == 1:
        logger.warning(
            "%s: one row tunes, and judges what was tuned on it, so figures will look better than they are; "
            "give more text, a smaller seqlen, or :concat",
            rows.summary,
        )
        return replace(rows, rows=rows.rows * 2), 1
    short = count < wanted.nsamples + beside
    return rows, count - (min(beside, max(1, count // 8)) if short else beside)


def _within_context(options: Options, source: ModelSource) -> Options:
    """The same options with rows no longer than the model's context."""
    context, wanted = source.facts.context, options.calibration.seqlen
    if context is None or wanted <= context:
        return options
    level = logger.warning if "seqlen" in options.given else logger.info
    level("seqlen %d is longer than the model's context: rows have %d tokens", wanted, context)
    return replace(options, calibration=replace(options.calibration, seqlen=context))


def _runs_by_blocks(options: Options, tune: TuneConfig, source: ModelSource, dataset: Any) -> bool:
    """Whether the model can be run on calibration rows, which plain rounding can do without.

    Raises:
        UnsupportedError: it cannot, and the rows are needed.
    """
    needed = needs_rows(tune)
    if not needed and dataset is None and options.calibration.dataset == CalibrationOptions().dataset:
        return True  # nothing is run
    try:
        source.refuse_untraceable()
    except UnsupportedError as error:
        if needed:
            raise
        logger.warning("plain rounding without a measurement on the data: %s", error)
        return False
    return True


def _refuse_unknown_tokens(rows: CalibrationRows, source: ModelSource) -> None:
    known = source.facts.vocabulary
    largest = max(int(row.input_ids.max()) for row in rows.rows)
    smallest = min(int(row.input_ids.min()) for row in rows.rows)
    if largest >= known or smallest < 0:
        raise ConfigError(
            f"the calibration rows hold token {largest if largest >= known else smallest}, but the model's "
            f"vocabulary has {known}: is this the model's tokenizer, or data made for another model?"
        )
