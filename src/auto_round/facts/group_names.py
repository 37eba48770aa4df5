"""Names inside a group of neighbouring blocks: the position of the block, then the name inside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from auto_round.facts.layer import Block

T = TypeVar("T")


def prefixes_of(blocks: Sequence[Block], indices: Iterable[int]) -> dict[str, str]:
    """Position in the group -> path of the block in the model.

    Args:
        blocks: all of the model.
        indices: of those in the group, in order.
    """
    return {str(position): blocks[index].module for position, index in enumerate(indices)}


def inside(named: Mapping[str, T], prefixes: Mapping[str, str]) -> dict[str, T]:
    """What belongs to a group, by names inside it; the rest is left out.

    Args:
        named: module or parameter of the model -> anything.
        prefixes: of the group, see `prefixes_of`.
    """
    return {
        f"{position}.{name.removeprefix(f'{prefix}.')}": value
        for name, value in named.items()
        for position, prefix in prefixes.items()
        if name.startswith(f"{prefix}.")
    }


def outside(name: str, prefixes: Mapping[str, str]) -> str:
    """Name in the model of a module or parameter of a group with these `prefixes`."""
    position, _, rest = name.partition(".")
    return f"{prefixes[position]}.{rest}"
