"""Siblings: layers that inference engines fuse into one matrix and that therefore want one scheme."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Container of each fused matrix -> the layers in it: q/k/v, gate/up, all experts of a block."""
    families = {last: family for family in FUSED for last in family}
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        experts = _EXPERTS.match(name)
        if experts is not None and "shared" not in experts.group(1).rpartition(".")[2]:
            groups.setdefault(experts.group(1), []).append(name)
        elif last in families:
            groups.setdefault(f"{parent}.{'/'.join(families[last])}", []).append(name)
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
