"""Smaller groups for layers whose rows the scheme's group size does not divide.

Only where that size is the scheme's default: a size that the user chose is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from auto_round.facts.layer import Layer
from auto_round.schemes.condense import condense
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.number_types import has_short_groups
from auto_round.schemes.plan import PlanRequest
from auto_round.schemes.rules import Rule
from auto_round.schemes.scheme import QuantizationScheme, names_group_size
from auto_round.schemes.shapes import awkward_shape, divides, fitting_group


def regroup(
    layers: Sequence[Layer],
    asked: Mapping[str, PlanEntry],
    request: PlanRequest,
    rules: Mapping[str, Rule],
) -> tuple[dict[str, PlanEntry], list[str]]:
    """Give each layer whose rows are no whole number of groups the largest group size that divides them.

    With `request.one_group_size` all layers without a chosen size get the smallest of these.

    Args:
        layers: every layer of the model.
        asked: layer name -> its entry in the plan so far.
        request: the user's request, which tells whether a group size was chosen.
        rules: reason of an entry (`PlanEntry.reason`) -> the rule of `layer_config` that it comes from.

    Returns:
        The entries with the new sizes, and a sentence for the user (none where nothing changed).
    """
    sizes: dict[str, int] = {}
    for layer in layers:
        entry = asked[layer.name]
        if entry.scheme is None or awkward_shape(layer.shape) or not _is_free(entry, request, rules):
            continue
        group = entry.scheme.group_size
        fits = divides(group, layer.shape[1]) or has_short_groups(entry.scheme.data_type)
        size = None if fits else fitting_group(group, layer.shape[1])
        if size is not None:
            sizes[layer.name] = size
    if not sizes:
        return dict(asked), []
    if request.one_group_size:
        least = min(sizes.values())
        free = {name: e.scheme for name, e in asked.items() if _is_free(e, request, rules)}
        sizes = {name: least for name, s in free.items() if s is not None and s.group_size > least}
    changed = {name: _with_group(asked[name], size) for name, size in sizes.items()}
    return {**asked, **changed}, [_note(sizes, asked)]


def with_common_group(
    base: QuantizationScheme, asked: Mapping[str, PlanEntry], entries: Mapping[str, PlanEntry]
) -> QuantizationScheme:
    """The plan's own scheme, with the group size of its layers if they all got the same other one.

    Args:
        base: the plan's scheme.
        asked: layer name -> its entry before `regroup`.
        entries: the same after it.
    """
    own = [name for name, entry in asked.items() if entry.scheme is not None and not entry.fixed]
    sizes = {scheme.group_size for name in own if (scheme := entries[name].scheme) is not None}
    return replace(base, group_size=sizes.pop()) if len(sizes) == 1 and _regrouped(base, sizes) else base


def _regrouped(base: QuantizationScheme, sizes: set[int]) -> bool:
    return base.group_size not in sizes and base.recipe is None


def _is_free(entry: PlanEntry, request: PlanRequest, rules: Mapping[str, Rule]) -> bool:
    """Whether the group size of an entry is its scheme's default; False where the user chose it."""
    own = request.overrides.get("group_size") is None and not names_group_size(request.scheme)
    rule = rules.get(entry.reason)
    if rule is None:
        return own
    value = (request.layer_config or {})[rule.key]
    return not names_group_size(value) and (own or isinstance(value, str))


def _with_group(entry: PlanEntry, size: int) -> PlanEntry:
    if entry.scheme is None:
        return entry
    return replace(entry, scheme=replace(entry.scheme, group_size=size))


def _note(sizes: Mapping[str, int], asked: Mapping[str, PlanEntry]) -> str:
    """One sentence on all layers with smaller groups."""
    parts = []
    for size in sorted(set(sizes.values()), reverse=True):
        names = [name for name in sizes if sizes[name] == size]
        parts.append(f"{len(names)} layers take groups of {size}: {', '.join(map(str, condense(names)))}")
    groups = sorted({s.group_size for name in sizes if (s := asked[name].scheme) is not None})
    wanted = " and ".join(map(str, groups))
    return f"groups of {wanted} do not divide all rows, so {'; '.join(parts)} (--group_size chooses for all)"
