"""One plan for all formats of a run: made from the user's rules, changed where a format's readers need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from auto_round.config.options import Options
from auto_round.errors import AutoRoundError, CannotHoldError, Refusal, UnsupportedError
from auto_round.export.exporter import Exporter
from auto_round.export.planning import Planned
from auto_round.export.table import EXPORTERS, all_refusals, scale_dtype
from auto_round.models.source import ModelSource
from auto_round.pipeline.deciding.one_parameter import refuse_torn_tensors
from auto_round.pipeline.deciding.unaddressed import refuse_nothing, with_unaddressed, without_kept
from auto_round.schemes.make import make_plan
from auto_round.schemes.plan import Plan
from auto_round.schemes.request import plan_request
from auto_round.schemes.scheme import parse_scheme
from auto_round.tuning.settings import tune_settings


def plan_together(
    source: ModelSource, tokenizer: Any, options: Options, asked: Sequence[Exporter]
) -> Planned:
    """One plan for all formats of a run that do not plan for themselves.

    Arguments as for `Planner`.

    Raises:
        NothingQuantizedError: the run would only copy the model.
        CannotHoldError: a format cannot hold the plan; names those that can.
    """
    plan = _plan(options, source, asked)
    exporters = _exporters(asked, plan, source, options)
    notes = [note for exporter in asked for note in exporter.warnings(plan, source.layers)]
    return Planned(plan, exporters, notes=(*plan.warnings, *notes))


def _plan(options: Options, source: ModelSource, asked: Sequence[Exporter]) -> Plan:
    wanted = parse_scheme(options.scheme.scheme, options.scheme.overrides())
    scales = scale_dtype(asked, source.dtype, wanted.data_type)
    request = plan_request(options.scheme, scales, options.chosen_layers)
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
    refuse_torn_tensors(plan, source.layers)
    refuse_nothing(plan, source)
    return plan


def _refused(asked: Sequence[Exporter], plan: Plan, source: ModelSource) -> list[Refusal]:
    return [r for e in asked for r in all_refusals(e, plan, source.layers, source.loading)]


def _objections(asked: Sequence[Exporter], plan: Plan, source: ModelSource) -> int:
    """How many objections formats and their readers have to a plan."""
    return len(_refused(asked, plan, source)) + sum(len(e.warnings(plan, source.layers)) for e in asked)


def _exporters(
    asked: Sequence[Exporter], plan: Plan, source: ModelSource, options: Options
) -> dict[str, Exporter]:
    """Format name -> exporter with its variant decided.

    Raises:
        CannotHoldError: a format cannot hold the plan; names those that can.
    """
    refused = _refused(asked, plan, source)
    if refused:
        others = [e.name for e in asked if all(r.who != e.name for r in refused)]
        alone = f"; {', '.join(others)} can: run once for each format that is left" if others else ""
        if not others and (able := _able(options, source, asked)):
            alone = f"; formats that can: {', '.join(able)}"
        raise CannotHoldError(
            f"this plan cannot be written as asked{alone}", [*refused, *_untraceable(source, options)]
        )
    return {e.name: e.for_plan(plan, source.layers) for e in asked}


def _untraceable(source: ModelSource, options: Options) -> tuple[Refusal, ...]:
    """Why the model cannot be run block by block, where that is needed: another format does not help."""
    bits = parse_scheme(options.scheme.scheme, options.scheme.overrides()).bits
    if options.auto.asked or tune_settings(options.tune, bits).needs_rows:
        try:
            source.refuse_untraceable()
        except UnsupportedError as error:
            return error.refusals
    return ()


def _able(options: Options, source: ModelSource, asked: Sequence[Exporter]) -> list[str]:
    """Other formats that hold what is asked for, each with the plan that it would get alone."""
    found = []
    for exporter in EXPORTERS.values():
        if exporter in asked or exporter.planner is not None:
            continue
        try:
            plan = _plan(options, source, [exporter])
        except AutoRoundError:
            continue
        if not _refused([exporter], plan, source):
            found.append(exporter.name)
    return found
