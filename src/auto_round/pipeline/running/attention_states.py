"""Queries, keys and values of attention modules: observed at calibration, and rounded from then on.

They are seen where the attention function of `models.causal_attention` gets them: behind position
embeddings, keys and values as a cache would hold them. A hook hands that function one more argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.calibration.observe import MaskOf
from auto_round.errors import NumericsError, Refusal, UnsupportedError
from auto_round.facts.attention import KEYS, QUERIES, VALUES, Attention
from auto_round.models.causal_attention import STATES, States
from auto_round.numerics.head_steps import HeadSteps
from auto_round.schemes.attention import AttentionPlan


class StateRanges:
    """Largest magnitudes of the queries, keys and values of one attention, by head, at tokens that count.

    Attributes:
        largest: part -> `[heads]` float32; empty before the first token.
    """

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def add(self, states: Mapping[str, Tensor], mask: Tensor | None) -> None:
        """Take the states of one call into account.

        Args:
            states: part -> `[batch, heads, tokens, width]`.
            mask: `[batch, tokens]` bool, False for tokens that do not count; None: all count.
        """
        for part, x in states.items():
            sizes = x.detach().abs().amax(-1).float()
            if mask is not None and mask.shape == (x.shape[0], x.shape[2]):
                sizes = sizes * mask.to(x.device)[:, None]
            self.join({part: sizes.amax((0, 2))})

    def join(self, largest: Mapping[str, Tensor]) -> None:
        """Add what another observer found to be `largest`."""
        for part, found in largest.items():
            known = self.largest.get(part)
            self.largest[part] = found if known is None else torch.maximum(known, found)

    def steps(self, plan: AttentionPlan, attention: Attention) -> dict[str, HeadSteps]:
        """Part -> its steps, as stored.

        Raises:
            UnsupportedError: nothing was seen, or states with other heads than the configuration says.
            NumericsError: states are not finite.
        """
        found: dict[str, HeadSteps] = {}
        for part, count in plan.scales(attention).items():
            largest = self.largest.get(part)
            if largest is None or len(largest) != attention.heads_of(part):
                seen = "none" if largest is None else f"{len(largest)}"
                raise UnsupportedError(
                    f"{attention.name}: its cache cannot be calibrated",
                    [
                        Refusal(
                            "attention",
                            f"its {part} states have {seen} heads, expected {attention.heads_of(part)}",
                            "leave out static_kv_dtype and static_attention_dtype",
                        )
                    ],
                )
            if not bool(largest.isfinite().all()):
                raise NumericsError(f"{attention.name}: {part} states are not finite")
            sizes = largest.cpu() if count > 1 else largest.amax().reshape(1).cpu()
            found[part] = HeadSteps.of(sizes, attention.dtype)
        return found


_STEPS = "attention_steps"
"""Key of a journal entry."""


def steps_entry(states: Mapping[Attention, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Part of a journal entry: attention -> part -> its steps; `read_steps` gives back the same numbers."""
    found = {
        a.name: {part: step.float().tolist() for part, step in each.items()} for a, each in states.items()
    }
    return {_STEPS: found} if found else {}


def read_steps(
    plan: AttentionPlan | None, entries: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, HeadSteps]]:
    """Attention module of the model -> part -> its steps, of all entries of a journal."""
    named = {} if plan is None else {each.name: each for each in plan.modules}
    return {
        named[name].module: {
            p: HeadSteps(torch.tensor(s, dtype=named[name].dtype, device="cpu")) for p, s in parts.items()
        }
        for entry in entries
        for name, parts in entry.get(_STEPS, {}).items()
        if name in named
    }


@contextmanager
def observe_states(
    root: nn.Module, names: Sequence[str], mask_of: MaskOf | None = None
) -> Iterator[Mapping[str, StateRanges]]:
    """Look at the states of attention modules while the context lasts.

    Args:
        root: any module.
        names: dotted names of attention modules below it.
        mask_of: asked at each call for the mask of the batch that is running, `[batch, tokens]` bool.
    """
    ranges = {name: StateRanges() for name in names}

    def look(seen: StateRanges, q: Tensor, k: Tensor, v: Tensor) -> States:
        seen.add({QUERIES: q, KEYS: k, VALUES: v}, None if mask_of is None else mask_of())
        return q, k, v

    with _handed_over(root, {name: partial(look, seen) for name, seen in ranges.items()}):
        yield ranges


@contextmanager
def rounded_states(root: nn.Module, steps: Mapping[str, Mapping[str, HeadSteps]]) -> Iterator[None]:
    """Round keys and values while the context lasts, as a cache would hold them.

    Queries stay as they are: Transformers leaves them alone, engines round them in some kernels only.

    Args:
        root: any module.
        steps: dotted name of an attention module below it -> part -> its steps.
    """

    def rounded(steps: Mapping[str, HeadSteps], q: Tensor, k: Tensor, v: Tensor) -> States:
        return q, steps[KEYS].fake_quantize(k), steps[VALUES].fake_quantize(v)

    with _handed_over(root, {name: partial(rounded, each) for name, each in steps.items()}):
        yield


@contextmanager
def _handed_over(root: nn.Module, changes: Mapping[str, Callable[..., States]]) -> Iterator[None]:
    handles = [
        root.get_submodule(name).register_forward_pre_hook(partial(_hand_over, change), with_kwargs=True)
        for name, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_over(
    change: Callable[..., States], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    return args, {**kwargs, STATES: change}
