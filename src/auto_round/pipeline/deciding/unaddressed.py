"""Matrices that cannot be quantized: the plan warns of them; a run with no others is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from auto_round.errors import NothingQuantizedError, Refusal
from auto_round.export.exporter import Exporter
from auto_round.facts.layer import Layer
from auto_round.models.source import ModelSource
from auto_round.schemes.condense import some
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.plan import Plan

_FEW = 0.0005
"""A warning gives the share of the model's weights from this share on."""


def with_unaddressed(plan: Plan, source: ModelSource) -> Plan:
    """The plan with a warning for each reason why some matrices cannot be addressed and stay as they are."""
    grouped = _by_reason(source)
    if not grouped or not _asks(plan):
        return plan
    total = sum(spec.count for spec in source.tensors.values())
    notes = []
    for reason, names in grouped.items():
        share = sum(source.tensors[n].count for n in names if n in source.tensors) / max(1, total)
        size = f" ({share:.1%} of the model's weights)" if share >= _FEW else ""
        notes.append(f"{len(names)} matrices stay at 16 bits{size}: {reason}: {some(names)}")
    return replace(plan, warnings=(*plan.warnings, *notes))


def without_kept(plan: Plan, layers: Sequence[Layer], exporters: Sequence[Exporter]) -> Plan:
    """The plan with those layers kept that readers of some requested format cannot load packed."""
    entries = dict(plan.entries)
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        why = next((why for exporter in exporters if (why := exporter.kept(layer))), "")
        if why and entries[layer.name].scheme is not None:
            entries[layer.name] = PlanEntry(None, why, entries[layer.name].fixed)
            reasons.setdefault(why, []).append(layer.name)
    notes = (f"{len(names)} layers keep 16 bits: {why}: {some(names)}" for why, names in reasons.items())
    return replace(plan, entries=entries, warnings=(*plan.warnings, *notes)) if reasons else plan


def refuse_nothing(plan: Plan, source: ModelSource) -> None:
    """Refuse a run that would only copy the model, unless the user's own rules keep every layer.

    Raises:
        NothingQuantizedError: with what keeps the layers.
    """
    own = (entry.fixed and entry.scheme is None for entry in plan.entries.values())
    chosen = bool(plan.block_prefixes) or any(own)
    if plan.quantized or not _asks(plan) or chosen:
        return
    refusals = [
        Refusal("models", f"{reason}: {some(names)}", "kept at 16 bits")
        for reason, names in _by_reason(source).items()
    ]
    kept: dict[str, list[str]] = {}
    for name, entry in plan.entries.items():
        kept.setdefault(entry.why(name), []).append(name)
    refusals += [Refusal("plan", f"{reason}: {some(names)}") for reason, names in kept.items()]
    raise NothingQuantizedError("no matrix of this model can be quantized as asked", refusals)


def _asks(plan: Plan) -> bool:
    return plan.scheme.quantized or plan.scheme.act_quantized


def _by_reason(source: ModelSource) -> dict[str, list[str]]:
    """Why matrices cannot be addressed -> their names on disk."""
    grouped: dict[str, list[str]] = {}
    for refusal in source.unsupported:
        grouped.setdefault(refusal.reason, []).append(refusal.who)
    return grouped
