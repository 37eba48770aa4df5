"""Fourth step of a job: the calibration rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from auto_round.calibration.row import CalibrationRow, fingerprint
from auto_round.calibration.rows import CalibrationRows, load_rows
from auto_round.calibration.self_text import SelfText
from auto_round.calibration.sources import OfModel
from auto_round.calibration.writing_systems import letters_of
from auto_round.config.groups import CalibrationOptions
from auto_round.config.options import Options
from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.facts.layer import Role
from auto_round.log import logger
from auto_round.models.hub import Platform
from auto_round.models.source import ModelSource, Traceable
from auto_round.pipeline.deciding.decide import Decided
from auto_round.pipeline.deciding.image_rows import (
    first_with_images,
    refuse_other_inputs,
    with_each_kind_held_out,
)
from auto_round.pipeline.deciding.one_parameter import refuse_mixed_parameters
from auto_round.pipeline.deciding.open_model import Opened, load_tokenizer
from auto_round.pipeline.deciding.own_text import own_text
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.distill import rows_of_step

HELD_OUT_SHARE = 8
"""One row in so many is not tuned on: such rows choose the step that is kept, and measure the result."""
MOST_HELD_OUT = 8
"""Most of them, and rows by which plain rounding is measured on data that the user names."""
PLAINLY = "or round without data: --disable_opt_rtn, or the command auto-round-rtn"
"""What is left to users whose run needs data for nothing but searched ranges."""
MOST_SEEN = 4
"""How often steps of all blocks together see a row, at most, where data have fewer rows than they take."""


@dataclass(frozen=True, slots=True)
class Data:
    """The calibration rows of a run.

    Attributes:
        rows: calibration rows, those held out last; None for plain rounding without data.
        tuned: how many of the rows are tuned on; the rest are held out.
        more: loads so many rows of the same data, these among them; None where it can be read only once.
        fresh: further rows, of the stage after block tuning.
        dtype: dtype in which blocks run on them, where it is not the one decided on.
    """

    rows: CalibrationRows | None = None
    tuned: int = 0
    more: Callable[[int], CalibrationRows] | None = None
    fresh: tuple[CalibrationRow, ...] = ()
    dtype: torch.dtype | None = None


def fetch_rows(
    opened: Opened,
    decided: Decided,
    device: torch.device,
    *,
    dataset: Any = None,
    dry: bool = False,
    quiet: bool = False,
) -> Data:
    """The rows that the run needs, none where it needs none.

    Args:
        opened: model and tokenizer.
        decided: settings of the tuning loop.
        device: where a model runs that writes rows itself.
        dataset: calibration data as Python objects instead of `options.calibration.dataset`.
        dry: fetch nothing, only refuse a model that cannot be run on rows.
        quiet: a trial, of which the user hears nothing but refusals.

    Raises:
        ConfigError: no tokenizer, or rows of another model.
        UnsupportedError: the rows are needed and the model cannot be run on them.
        AutoRoundError: no data.
    """
    options, source, tokenizer = opened.options, opened.source, opened.tokenizer
    if options.tune.distill_steps:
        _refuse_several_lists(source)
    if decided.importance or not _is_run(opened, decided, dataset):
        return Data()
    needed = decided.tune.needs_rows
    traced = _if_able(partial(_trace, opened, decided, device), needed=needed)
    if traced is None or dry:
        return Data(dtype=traced.dtype if traced else None)
    decided = replace(decided, dtype=traced.dtype)
    if tokenizer is None and needed and dataset is None and source.folder is not None:
        tokenizer = load_tokenizer(options, source, required=True)
    opened = replace(opened, tokenizer=tokenizer)
    writer = own_text(opened, device, decided.dtype)
    data = _rows(options, decided.tune, opened, writer, dataset, quiet=quiet)
    if data.rows is not None:
        refuse_unknown_tokens([*data.rows.rows, *data.fresh], source)
        refuse_other_inputs(data.rows.rows, source, ready=dataset is not None)
        traced = _if_able(partial(_reach_all_blocks, data.rows.rows, source, decided, device), needed=needed)
        if traced is None:
            return Data()
        data = replace(data, rows=_with_letters(data.rows, tokenizer), dtype=traced.dtype)
    return data


def _with_letters(rows: CalibrationRows, tokenizer: Any) -> CalibrationRows:
    """The same with the scripts of their text, where something tells it."""
    if not hasattr(tokenizer, "decode"):
        return rows
    return replace(rows, letters=letters_of(rows.rows, partial(tokenizer.decode, skip_special_tokens=True)))


def held_out_rows(nsamples: int) -> int:
    """Rows held out beside `nsamples` tuned ones: a share of as many, but 2 to `MOST_HELD_OUT`."""
    return min(MOST_HELD_OUT, max(2, nsamples // HELD_OUT_SHARE))


def tuned_of(count: int, nsamples: int) -> int:
    """How many of `count` rows, 2 at least, are tuned on where data may hold fewer than were wanted."""
    beside = held_out_rows(nsamples)
    short = count < nsamples + beside
    return count - (min(beside, max(1, count // HELD_OUT_SHARE)) if short else beside)


def _rows(
    options: Options, tune: TuneConfig, opened: Opened, writer: SelfText, dataset: Any, *, quiet: bool
) -> Data:
    """Rows to tune on and, behind them, rows to hold out."""
    wanted = options.calibration
    data = wanted.dataset if dataset is None else dataset
    platform: Platform = "model_scope" if options.model.platform == "model_scope" else "hf"
    usual = dataset is None and wanted.dataset == CalibrationOptions().dataset

    def load(count: int) -> CalibrationRows:
        try:
            found = load_rows(
                data,
                opened.tokenizer,
                nsamples=count,
                seqlen=wanted.seqlen,
                seed=wanted.seed,
                platform=platform,
                of_model=OfModel(opened.images, writer),
            )
        except ConfigError as error:
            if usual and tune.search and not replace(tune, search=False).needs_rows:
                raise ConfigError(f"{error}; {PLAINLY}") from error
            raise
        if found.missing and not quiet:
            logger.warning(found.missing)
        return found

    if not tune.needs_rows:
        if usual:
            return Data()
        return Data(load(MOST_HELD_OUT))
    beside, later = held_out_rows(wanted.nsamples), fresh_rows(options)
    rows = load(wanted.nsamples + beside + later)
    once = isinstance(dataset, Iterator)
    more = None if once else lambda count: load(count + later)
    if later:
        return replace(_with_fresh(rows, options, later, quiet=quiet), more=more)
    if len(rows.rows) == 1:
        return _one_row(rows)
    tuned = tuned_of(len(rows.rows), wanted.nsamples)
    return Data(with_each_kind_held_out(rows, tuned), tuned, more)


def _one_row(rows: CalibrationRows) -> Data:
    """The only row twice: to tune on, and to judge by; tells the user what that is worth."""
    logger.warning(
        "%s: one row tunes, and judges what was tuned on it, so figures will look better than they are; "
        "give more text, a smaller seqlen, or :concat",
        rows.summary,
    )
    return Data(replace(rows, rows=rows.rows * 2), 1)


def fresh_rows(options: Options) -> int:
    """Rows that the stage after block tuning wants for itself."""
    tune = options.tune
    if not tune.distill_steps:
        return 0
    return tune.distill_nsamples or tune.distill_steps * rows_of_step(options.calibration.seqlen)


def _refuse_several_lists(source: ModelSource) -> None:
    """Refuse the stage after block tuning for models of which one list of blocks reads what another gave.

    Raises:
        UnsupportedError: it is such a model.
    """
    if len(source.block_lists) > 1:
        reason = f"it has {len(source.block_lists)} lists of blocks, such as an encoder and a decoder"
        raise UnsupportedError(
            "distill_steps goes through one list of blocks",
            [Refusal("distillation", reason, "leave distill_steps out")],
        )


def _with_fresh(rows: CalibrationRows, options: Options, wanted: int, *, quiet: bool) -> Data:
    """Rows to tune blocks on, to hold out, and for the stage after block tuning.

    Args:
        rows: all of them, in this order; the stage gets all that are left.
        options: the user's.
        wanted: rows for the stage, see `fresh_rows`; with fewer, its steps see each row several times.
        quiet: do not tell the user of that.

    Raises:
        ConfigError: there are too few for all three.
        UnsupportedError: some have images.
    """
    tuned, found = options.calibration.nsamples, len(rows.rows)
    beside = held_out_rows(tuned)
    least = wanted if options.tune.distill_nsamples else math.ceil(wanted / MOST_SEEN)
    if found < tuned + beside + least:
        raise ConfigError(
            f"distill_steps takes rows that blocks are not tuned on: expected {tuned} + {beside} held out + "
            f"{least} more, and the data give {found} ({rows.summary}). Give more data, cut all rows out of "
            "long texts (:concat after the data set's name), or take fewer steps, fewer rows for each of the "
            "two (--nsamples, --distill_nsamples: the same rows are then seen again), or shorter ones "
            "(--seqlen)"
        )
    if first_with_images(rows.rows) is not None:
        raise UnsupportedError(
            "distill_steps reads text only",
            [Refusal("distillation", "some calibration rows have images", "give text, or leave it out")],
        )
    first, fresh = rows.rows[: tuned + beside], rows.rows[tuned + beside :]
    if len(fresh) < wanted and not quiet:
        logger.warning(
            "%s: distill_steps see each of %d rows %.1f times; %d rows would be better (:concat after "
            "the data set's name cuts all rows out of long texts)",
            *(rows.summary, len(fresh), wanted / len(fresh), wanted),
        )
    return Data(replace(rows, rows=first, fingerprint=fingerprint(first)), tuned, fresh=fresh)


def _is_run(opened: Opened, decided: Decided, dataset: Any) -> bool:
    """Whether the model is run on rows: plain rounding runs it only on data that the user names."""
    usual = opened.options.calibration.dataset == CalibrationOptions().dataset
    return decided.tune.needs_rows or dataset is not None or not usual


def _trace(opened: Opened, decided: Decided, device: torch.device) -> Traceable:
    """How the model runs block by block on text.

    Raises:
        UnsupportedError: it does not.
    """
    refuse_mixed_parameters(decided.plan, opened.source.layers)
    return opened.source.refuse_untraceable(dtype=decided.dtype, device=device)


def _if_able(find_out: Callable[[], Traceable], *, needed: bool) -> Traceable | None:
    """How the model runs; None where it does not, and plain rounding can do without.

    Raises:
        UnsupportedError: it does not, and that is needed.
    """
    try:
        return find_out()
    except UnsupportedError as error:
        if needed:
            raise
        logger.warning("plain rounding without a measurement on the data: %s", error)
        return None


def _reach_all_blocks(
    rows: Sequence[CalibrationRow], source: ModelSource, decided: Decided, device: torch.device
) -> Traceable:
    """How the model runs on these rows.

    Raises:
        UnsupportedError: it does not, or tuning needs rows for blocks with layers to quantize that these
            leave out.
    """
    pictured = first_with_images(rows)
    if pictured is None and decided.tune.needs_rows:
        _refuse_towers_without_images(source, decided.plan)
    inputs = None if pictured is None else pictured.inputs
    traced = source.refuse_untraceable(inputs, decided.dtype, device)
    if decided.tune.needs_rows:
        _refuse_unreached(source, decided.plan, traced.skipped)
    return traced


def _refuse_towers_without_images(source: ModelSource, plan: Plan) -> None:
    """Refuse to round towers by data that say nothing of them.

    Raises:
        ConfigError: the plan quantizes some.
    """
    towers = (layer.name for layer in source.layers if layer.role is Role.TOWER)
    unseen = [name for name in towers if plan.scheme_of(name) is not None]
    if unseen:
        raise ConfigError(
            f"{some(unseen)} read images, and the calibration data hold none: give records with images, or "
            "plain rounding, which needs no data (--recipe rtn)"
        )


def _refuse_unreached(source: ModelSource, plan: Plan, skipped: Collection[int]) -> None:
    """Refuse rows that do not reach blocks with layers to quantize.

    Raises:
        UnsupportedError: there are such blocks.
    """
    layers = (layer for layer in source.layers if layer.block in skipped)
    unreached = [layer.name for layer in layers if plan.scheme_of(layer.name) is not None]
    if unreached:
        raise UnsupportedError(
            "text alone does not run all blocks of this model",
            [
                Refusal(
                    "models",
                    f"{some(unreached)} are called only where there are images",
                    "give data with images, keep these layers (--ignore_layers), or use plain rounding, "
                    "which runs no block: --recipe rtn",
                )
            ],
        )


def refuse_unknown_tokens(rows: Sequence[CalibrationRow], source: ModelSource) -> None:
    """Refuse rows that hold tokens which the model does not know.

    Raises:
        ConfigError: they do.
    """
    known = max(source.facts.vocabulary, source.facts.image_token + 1)
    largest = max(int(row.tokens.max()) for row in rows)
    smallest = min(int(row.tokens.min()) for row in rows)
    if largest >= known or smallest < 0:
        raise ConfigError(
            f"the calibration rows hold token {largest if largest >= known else smallest}, but the model's "
            f"vocabulary has {known}: is this the model's tokenizer, or data made for another model?"
        )
