"""How two models' predictions differ at each position of a text."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from auto_round.evaluate.logits import positions_at_once

TOP_K: Final = (5, 10)
"""Sizes of the sets of most likely tokens that are compared."""

MEANINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "nll_original": "negative log likelihood of the text's token by the original, nats",
        "nll": "the same by the other model, nats",
        "kl": "KL(original || other), nats",
        "kl_reverse": "KL(other || original), nats",
        "difference": "probability of the text's token: the other model's less the original's",
        "confidence": "the original's largest probability",
        "same_top": "1 where both find the same token most likely",
        **{f"top_{k}": f"share of the {k} most likely tokens that both have" for k in TOP_K},
    }
)
"""Figures of a position, by name; each is `[positions]` float64."""

Figures = dict[str, Tensor]


def compare_positions(reference: Tensor, candidate: Tensor, following: Tensor) -> Figures:
    """Figures of each position, see `MEANINGS`.

    Args:
        reference: logits of the original, `[positions, vocabulary]`.
        candidate: logits of the other model, on any device.
        following: the token that comes next at each position, `[positions]` int64.
    """
    step = positions_at_once(reference.shape[-1])
    parts = [
        _compare(
            reference[i : i + step].to(candidate.device), candidate[i : i + step], following[i : i + step]
        )
        for i in range(0, len(following), step)
    ]
    return joined(parts)


def likelihoods(logits: Tensor, following: Tensor) -> Figures:
    """`nll` of each position of one model alone; arguments as of `compare_positions`."""
    step = positions_at_once(logits.shape[-1])
    parts = []
    for i in range(0, len(following), step):
        found = logits[i : i + step].float().log_softmax(-1)
        parts.append({"nll": -_of_text(found, following[i : i + step]).double().cpu()})
    return joined(parts)


def joined(parts: list[Figures]) -> Figures:
    """Figures of all positions from those of pieces, in order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _compare(reference: Tensor, candidate: Tensor, following: Tensor) -> Figures:
    first, second = reference.float().log_softmax(-1), candidate.float().log_softmax(-1)
    p, q = first.exp(), second.exp()
    chosen_first, chosen_second = _of_text(first, following), _of_text(second, following)
    most = min(max(TOP_K), p.shape[-1])
    top_first, top_second = p.topk(most, dim=-1), q.topk(most, dim=-1)
    found = {
        "nll_original": -chosen_first,
        "nll": -chosen_second,
        "kl": (p * (first - second)).sum(-1),
        "kl_reverse": (q * (second - first)).sum(-1),
        "difference": chosen_second.exp() - chosen_first.exp(),
        "confidence": top_first.values[:, 0],
        "same_top": first.argmax(-1) == second.argmax(-1),
    }
    for k in TOP_K:
        found[f"top_{k}"] = _shared(top_first.indices[:, :k], top_second.indices[:, :k])
    return {name: value.double().cpu() for name, value in found.items()}


def _of_text(log_probabilities: Tensor, following: Tensor) -> Tensor:
    index = following.to(log_probabilities.device).unsqueeze(-1)
    return log_probabilities.gather(-1, index).squeeze(-1)


def _shared(first: Tensor, second: Tensor) -> Tensor:
    """Share of the entries of each row that are in the other's row too."""
    return (first.unsqueeze(-1) == second.unsqueeze(-2)).any(-1).double().mean(-1)
