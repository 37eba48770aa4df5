"""Groups: layers that must get one scheme, since engines fuse them or the user wants it so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from auto_round.errors import ConfigError
from auto_round.facts.layer import Layer
from auto_round.schemes.rules import find_layers, nearest_layers
from auto_round.schemes.siblings import fused_groups

Fusing = Callable[[Iterable[str]], Mapping[str, list[str]]]
"""Names of layers -> those of each matrix that readers of a format make of several."""


def nothing_fused(names: Iterable[str]) -> dict[str, list[str]]:
    """What a reader fuses that leaves every layer alone."""
    return {}


def group_layers(
    layers: Sequence[Layer],
    chosen: Iterable[str],
    shared: Sequence[Sequence[str]] = (),
    *,
    fused: Fusing = fused_groups,
) -> list[tuple[str, ...]]:
    """Put layers that must get one scheme together.

    Most engines fuse q/k/v, gate/up and the experts of a block; matrices of one parameter cannot differ
    either.
    The user's sets widen this: exact names join each other wherever they are, patterns join what they find
    inside each block.

    Args:
        layers: every layer of the model, in the order of execution.
        chosen: names of those whose scheme is to be chosen.
        shared: the user's sets of names and patterns.
        fused: what readers fuse.

    Returns:
        Names of each group, in the order of execution.

    Raises:
        ConfigError: a name or pattern that matches no layer; names the nearest.
    """
    wanted = dict.fromkeys(chosen)
    sets = [*fused(wanted).values(), *_parameters(layers, wanted), *_user_sets(layers, shared)]
    parent = {name: name for name in wanted}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for names in sets:
        members = [root(name) for name in names if name in wanted]
        for member in members[1:]:
            parent[root(member)] = root(members[0])
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if layer.name in wanted:
            groups.setdefault(root(layer.name), []).append(layer.name)
    return [tuple(names) for names in groups.values()]


def _parameters(layers: Iterable[Layer], wanted: Mapping[str, None]) -> list[list[str]]:
    """Layers that are parts of one parameter of the model, such as stacked experts."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.name in wanted:
            found.setdefault(layer.parameter, []).append(layer.name)
    return [names for names in found.values() if len(names) > 1]


def _user_sets(layers: Sequence[Layer], shared: Sequence[Sequence[str]]) -> list[list[str]]:
    names = dict.fromkeys(layer.name for layer in layers)
    block_of = {layer.name: layer.block for layer in layers}
    sets: list[list[str]] = []
    for entry in shared:
        exact = [key for key in entry if key in names]
        inside: dict[int | None, list[str]] = {}
        for key in entry:
            found = find_layers(key, names, "shared_layers")
            if not found:
                raise ConfigError(f'shared_layers "{key}" matches no layer; {nearest_layers(key, names)}')
            for name in found:
                inside.setdefault(block_of[name], []).append(name)
        sets += [exact, *inside.values()]
    return sets
