"""Making a plan: roles give the defaults, the user's rules override them, shapes have the last word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from auto_round.errors import ConfigError
from auto_round.facts.layer import Block, Layer, Role
from auto_round.schemes.condense import condense
from auto_round.schemes.entry import CHOSEN, RULE, PlanEntry, by_rule
from auto_round.schemes.number_types import has_short_groups
from auto_round.schemes.plan import Plan, PlanRequest
from auto_round.schemes.regroup import regroup, with_common_group
from auto_round.schemes.rules import (
    Kind,
    Match,
    loose_number,
    match_blocks,
    match_ignored,
    match_layer_config,
)
from auto_round.schemes.scheme import QuantizationScheme, parse_scheme
from auto_round.schemes.shapes import (
    MULTIPLE,
    Misfit,
    awkward_shape,
    divides,
    refuse_input_misfits,
    refuse_misfits,
)
from auto_round.schemes.siblings import fused_warnings

KEPT_ROLES: Mapping[Role, str] = {
    Role.ROUTER: "router",
    Role.OUTSIDE: "outside the blocks",
    Role.HEAD: "output head (--quant_lm_head quantizes it)",
    Role.TOWER: "encoder of images or sound (--quant_nontext_module quantizes it)",
    Role.MODULATION: "modulation by the timestep (name it in --layer_config to quantize it)",
    Role.FURTHER: "no module of Transformers runs it (--quant_mtp rounds it without data)",
}
"""Role -> why its layers are kept unless the user asks for them."""


def make_plan(
    layers: Sequence[Layer],
    request: PlanRequest,
    *,
    blocks: Sequence[Block] = (),
    tied_head: bool = False,
    other_names: Iterable[str] = (),
) -> Plan:
    """Decide what becomes of every layer.

    A layer's exact name in `layer_config` is stronger than `ignore_layers`, that stronger than partial names
    and regular expressions. Routers, the head and layers outside of the blocks are kept by default; a pattern
    reaches them only when it names nothing else, so that `mlp` does not quantize `mlp.gate`. Rows that are no
    whole number of groups get smaller groups where the user named no size.

    Args:
        layers: every matrix that could be quantized, in the order of execution, the head included even when
            it is tied.
        request: what the user asked for.
        blocks: every decoder block; needed for `to_quant_block_names`.
        tied_head: the head shares its tensor with the embedding.
        other_names: modules that are never quantized (embeddings, norms); ignoring them is no error.

    Raises:
        ConfigError: a pattern that matches nothing, a scheme that is none, a group size that the user named
            and that does not divide the rows of a layer, `quant_lm_head` without a head.
        UnsupportedError: a scheme that cannot be computed yet.
    """
    base = parse_scheme(request.scheme, request.overrides)
    names = [layer.name for layer in layers]
    prefixes, chosen = match_blocks(request.to_quant_block_names, blocks)
    defaults = _defaults(layers, base, request, chosen if prefixes else None)
    others = tuple(other_names)
    ignored = match_ignored(request.ignore_layers, names, others)
    matches = match_layer_config(request.layer_config, base, names, others)
    asked = _apply(defaults, matches, ignored, request)
    rules = {_reason(match, request): match.rule for match in matches}
    fitted, regrouped = regroup(layers, asked, request, rules)
    entries, notes = _fit_shapes(layers, fitted)
    base = with_common_group(base, asked, entries)
    head = _head(layers, request)
    tied = head if tied_head else None
    return Plan(
        scheme=base,
        entries=entries,
        rules=tuple(match.rule for match in matches),
        ignored=tuple(dict.fromkeys(ignored.values())),
        block_prefixes=prefixes,
        tied_head=tied,
        untie_head=tied is not None and entries[tied].scheme is not None,
        warnings=(
            *notes,
            *regrouped,
            *filter(None, (loose_number(match, names) for match in matches)),
            *_unused(rules, asked),
            *_general(layers, base, entries),
            *fused_warnings(entries),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Default:
    """What a layer gets without the user's rules; `open` layers are reached by every pattern."""

    entry: PlanEntry
    open: bool


def _defaults(
    layers: Sequence[Layer], base: QuantizationScheme, request: PlanRequest, chosen: frozenset[int] | None
) -> dict[str, _Default]:
    """Layer -> what it gets without rules; `chosen` are the blocks that the user names, None for all."""
    by_role = {role: _default(role, base, request) for role in {layer.role for layer in layers}}
    skipped = _Default(PlanEntry(None, "not in to_quant_block_names"), open=False)
    return {
        layer.name: by_role[layer.role] if chosen is None or not _outside(layer, by_role, chosen) else skipped
        for layer in layers
    }


def _head(layers: Sequence[Layer], request: PlanRequest) -> str | None:
    """Name of the output head; None without one.

    Raises:
        ConfigError: there is none, and the user wants it quantized.
    """
    head = next((layer.name for layer in layers if layer.role is Role.HEAD), None)
    if request.quant_lm_head and head is None:
        raise ConfigError("quant_lm_head: this model has no output head; leave the option out")
    if request.quant_nontext_module and not any(layer.role is Role.TOWER for layer in layers):
        raise ConfigError("quant_nontext_module: this model has no encoder of images or sound; leave it out")
    if request.quant_mtp and not any(layer.role is Role.FURTHER for layer in layers):
        raise ConfigError("quant_mtp: this model has no layers for multi-token prediction; leave it out")
    return head


def _default(role: Role, base: QuantizationScheme, request: PlanRequest) -> _Default:
    asked = {
        Role.HEAD: request.quant_lm_head,
        Role.TOWER: request.quant_nontext_module,
        Role.FURTHER: request.quant_mtp,
    }
    if role in KEPT_ROLES and not asked.get(role, False):
        return _Default(PlanEntry(None, KEPT_ROLES[role]), open=False)
    scheme = base.for_role(role)
    reason = f"scheme {' / '.join(base.presets[:1]) or base.label}"
    return _Default(PlanEntry(scheme if _changes(scheme) else None, reason), open=True)


def _outside(layer: Layer, by_role: Mapping[Role, _Default], chosen: frozenset[int]) -> bool:
    """Whether the user's choice of blocks leaves out a layer that would be quantized.

    It says nothing of what has an option of its own.
    """
    own = layer.role in (Role.HEAD, Role.TOWER, Role.FURTHER)
    return not own and by_role[layer.role].open and layer.block not in chosen


def _changes(scheme: QuantizationScheme) -> bool:
    return scheme.quantized or scheme.act_quantized


def _apply(
    defaults: Mapping[str, _Default],
    matches: Sequence[Match],
    ignored: Mapping[str, str],
    request: PlanRequest,
) -> dict[str, PlanEntry]:
    """Entries after the rules: exact names, then `ignore_layers`, then patterns."""
    fixed: dict[str, PlanEntry] = {}
    for match in matches:
        reached = {name for name in match.names if defaults[name].open}
        exact = match.rule.kind is Kind.EXACT
        for name in match.names if exact else reached or match.names:
            if exact or name not in ignored:
                fixed.setdefault(name, PlanEntry(match.rule.scheme, _reason(match, request), fixed=True))
    for name, entry in ignored.items():
        fixed.setdefault(name, PlanEntry(None, f'ignore_layers "{entry}"', fixed=True))
    plain = {name: default.entry for name, default in defaults.items()}
    chosen = {n: replace(e, reason=by_rule(CHOSEN, n)) for n, e in plain.items() if n in request.chosen}
    return {**plain, **chosen, **fixed}


def _reason(match: Match, request: PlanRequest) -> str:
    return by_rule(CHOSEN if match.rule.key in request.chosen else RULE, match.rule.key)


def _fit_shapes(
    layers: Sequence[Layer], asked: Mapping[str, PlanEntry]
) -> tuple[dict[str, PlanEntry], list[str]]:
    """Entries after the rules of shape, and what the user should know of them."""
    entries: dict[str, PlanEntry] = {}
    awkward: list[str] = []
    misfits: list[Misfit] = []
    of_inputs: list[Misfit] = []
    for scheme in dict.fromkeys(entry.scheme for entry in asked.values()):
        if scheme is not None:
            scheme.weight_format()  # refuses what cannot be computed yet, once for each scheme
    for layer in layers:
        entry = asked[layer.name]
        entries[layer.name] = entry
        if entry.scheme is None:
            continue
        why = awkward_shape(layer.shape)
        if why is not None:
            entries[layer.name] = PlanEntry(None, why, entry.fixed)
            awkward.append(layer.name)
            continue
        n_in, size, inputs = layer.shape[1], entry.scheme.group_size, entry.scheme.inputs
        if not divides(size, n_in) and not has_short_groups(entry.scheme.data_type):
            misfits.append(Misfit(layer.name, n_in, size))
        elif inputs is not None and not divides(inputs.group_size, n_in):
            of_inputs.append(Misfit(layer.name, n_in, inputs.group_size))
    refuse_misfits(misfits)
    refuse_input_misfits(of_inputs)
    if not awkward:
        return entries, []
    where = ", ".join(map(str, condense(awkward)))
    return entries, [
        f"{len(awkward)} layers keep 16 bits since packing needs multiples of {MULTIPLE}: {where}"
    ]


def _unused(rules: Iterable[str], asked: Mapping[str, PlanEntry]) -> list[str]:
    """Rules, by the reason that they give, which others leave nothing to."""
    reasons = {entry.reason for entry in asked.values()}
    why = "exact names, ignore_layers and earlier patterns take all of its layers"
    return [f"{rule} has no effect: {why}" for rule in rules if rule not in reasons]


def _general(
    layers: Sequence[Layer], base: QuantizationScheme, entries: Mapping[str, PlanEntry]
) -> list[str]:
    notes = []
    if base.recipe is not None and all(layer.role is not Role.EXPERT for layer in layers):
        widths = {entry.label for entry in entries.values() if entry.scheme is not None and not entry.fixed}
        notes.append(
            f"{base.recipe} is meant for routed experts, this model has none: {', '.join(sorted(widths))}"
        )
    if _changes(base) and all(entry.scheme is None for entry in entries.values()):
        notes.append("no layer is quantized: every one is kept by a rule or by its shape")
    return notes
