"""Siblings: layers that inference engines fuse into one matrix, so that they should have one scheme."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from auto_round.facts.inputs import expert_of
from auto_round.schemes.condense import condense
from auto_round.schemes.entry import PlanEntry

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Last components of names that vLLM and SGLang load into one matrix."""

_EXPERTS = re.compile(r"(.*\bexperts)\.")
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(.*)")


_FAMILIES = {last: family for family in FUSED for last in family}


def joined_matrices(names: Iterable[str]) -> dict[str, list[str]]:
    """Container of each fused matrix -> the layers that are rows of it: q/k/v, gate/up, each expert's too.

    Such layers get the same input. Where a format stores one number a tensor, engines keep one for the whole
    fused matrix, so these layers must share it.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        groups.setdefault(f"{parent}.{'/'.join(_FAMILIES.get(last, (last,)))}", []).append(name)
    return groups


def expert_peers(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers of experts by what they are in each expert of their block: `experts.*.up_proj`.

    Inputs of experts that share a parameter are peers too (`facts.inputs`).
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        if (shared := expert_of(name)) is not None:
            groups.setdefault(f"{shared[0]}[*]", []).append(name)
        elif (found := _EXPERT.fullmatch(name)) is not None:
            groups.setdefault(f"{found[1]}.*.{found[2]}", []).append(name)
    return groups


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Container of each fused matrix -> the layers in it: q/k/v, gate/up, all experts of a block."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        experts = _EXPERTS.match(name)
        if experts is not None and "shared" not in experts.group(1).rpartition(".")[2]:
            groups.setdefault(experts.group(1), []).append(name)
        elif last in _FAMILIES:
            groups.setdefault(f"{parent}.{'/'.join(_FAMILIES[last])}", []).append(name)
    return groups


def fused_warnings(entries: Mapping[str, PlanEntry]) -> list[str]:
    """One line for each set of containers whose layers got different schemes."""
    mixed: dict[str, list[str]] = {}
    for container, names in fused_groups(entries).items():
        if all(entries[name].scheme == entries[names[0]].scheme for name in names):
            continue
        labels: dict[str, str] = {}
        for name in names:
            labels.setdefault(entries[name].label, name.rpartition(".")[2])
        text = ", ".join(f"{last} {label}" for label, last in labels.items())
        mixed.setdefault(text, []).append(container)
    advice = "vLLM and SGLang fuse these layers and need one scheme for all of them"
    return [
        f"{', '.join(map(str, condense(containers)))}: {text}; {advice}" for text, containers in mixed.items()
    ]
