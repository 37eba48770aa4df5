"""Names of what flows into matrices: modules, and experts that share a parameter with others."""

from __future__ import annotations

import re

WEIGHT = ".weight"
"""How the name of a layer's weight goes on behind the layer's own, in a model and on disk."""

_EXPERT = re.compile(r"(.*)\[(\d+)\]")


def input_of(parameter: str, expert: int | None) -> str:
    """Name of the input of a matrix.

    Args:
        parameter: dotted name of the parameter that holds it.
        expert: number of the expert, where the parameter holds a matrix for each.

    Returns:
        The module's name (`mlp.up_proj`), or the parameter's with the expert (`mlp.experts.down_proj[3]`).
    """
    return parameter.removesuffix(WEIGHT) if expert is None else f"{parameter}[{expert}]"


def expert_of(name: str) -> tuple[str, int] | None:
    """Parameter and number of the expert whose input a name means; None where it is that of a module."""
    found = _EXPERT.fullmatch(name)
    return None if found is None else (found[1], int(found[2]))


def owner_of(name: str) -> str:
    """Module, or parameter of several experts, that a name belongs to."""
    found = expert_of(name)
    return name if found is None else found[0]
