"""Tables for families whose blocks are not one plain list: what their modules do not say of themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from auto_round.facts.flow import HIDDEN_STATES, Flow

LISTS: Mapping[str, tuple[str, ...]] = {}
"""Class name of a model with several lists of blocks -> their module paths in order of execution."""
FLOWS: Mapping[str, Flow] = {}
"""Class name of a block that hands on several tensors -> which parameters receive them, and their order in
its output. All blocks of a list hand on equally many."""
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def flow_of(block: nn.Module) -> Flow:
    """What a block takes from the block before it: its first parameter, unless `FLOWS` has its class."""
    first = next(iter(inspect.signature(block.forward).parameters.values()), None)
    if type(block).__name__ in FLOWS:
        return FLOWS[type(block).__name__]
    if first is None or first.kind in _ANY:
        return HIDDEN_STATES
    return Flow((first.name,), (first.name,))


def parameter_names(block: nn.Module) -> tuple[str, ...]:
    """Names of what a block's forward takes, in order."""
    return tuple(inspect.signature(block.forward).parameters)
