"""Smaller groups where those of the scheme do not divide a row, and the user named no size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from auto_round.facts.layer import Layer
from auto_round.schemes.condense import condense
from auto_round.schemes.entry import PlanEntry
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
    """Give layers whose rows are no whole number of groups the largest groups that divide them.

    Args:
        layers: every layer.
        asked: entries by name.
        request: what the user said of schemes.
        rules: reason of an entry -> the rule of `layer_config` that it comes from.

    Returns:
        The entries, and what to tell the user.
    """
    sizes: dict[str, int] = {}
    for layer in layers:
        entry = asked[layer.name]
        if entry.scheme is None or awkward_shape(layer.shape) or not _is_free(entry, request, rules):
            continue
        group = entry.scheme.group_size
        size = None if divides(group, layer.shape[1]) else fitting_group(group, layer.shape[1])
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
    """The scheme of the whole with the group size that all of its layers came to, if it is one."""
    own = [name for name, entry in asked.items() if entry.scheme is not None and not entry.fixed]
    sizes = {scheme.group_size for name in own if (scheme := entries[name].scheme) is not None}
    return replace(base, group_size=sizes.pop()) if len(sizes) == 1 and _regrouped(base, sizes) else base


def _regrouped(base: QuantizationScheme, sizes: set[int]) -> bool:
    return base.group_size not in sizes and base.recipe is None


def _is_free(entry: PlanEntry, request: PlanRequest, rules: Mapping[str, Rule]) -> bool:
    """Whether the group size of an entry is the default of its scheme rather than anybody's wish."""
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
