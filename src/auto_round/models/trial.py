"""Traces of a few tokens, to find out whether a model runs block by block at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.errors import AutoRoundError
from auto_round.facts.model import TOKENS
from auto_round.models.earlier_results import untraceable
from auto_round.models.source import Trace
from auto_round.models.trace import StubStem

TRIAL_TOKENS = 64
"""As long as the pieces in which Transformers' xLSTM and gated delta rule go through a row (`chunk_size`),
for which they have code of their own."""


def trial_traces(
    stem: StubStem, inputs: Mapping[str, Tensor] | None, lists: int, longest: int
) -> list[Trace]:
    """Traces of all lists of blocks, each list ending in what flows into it.

    Args:
        stem: as a rule one with zeros for weights.
        inputs: of one row; None for some tokens.
        lists: how many lists there are.
        longest: most tokens that the model takes.

    Raises:
        UnsupportedError: the model cannot be run block by block, or not at all on these inputs.
    """
    tokens = torch.zeros(1, min(TRIAL_TOKENS, longest), dtype=torch.int64, device="cpu")
    given = {TOKENS: tokens} if inputs is None else inputs
    traces: list[Trace] = []
    try:
        for _ in range(lists):
            traces.append(stem.trace(given, [trace.states for trace in traces]))
        if inputs is not None:
            stem.refuse_what_flows_beside(inputs)
    except AutoRoundError:
        raise
    except Exception as error:
        if inputs is None:
            raise
        raise untraceable(
            f"its own code fails on {', '.join(inputs)} ({type(error).__name__}: {str(error).strip()[:200]})"
        ) from error
    return traces
