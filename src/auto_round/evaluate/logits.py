"""Figures from logits: perplexity, and the divergence of one model's predictions from another's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COMPARED_BYTES = 64 << 20
"""Memory for logits while two models are compared."""


@dataclass(slots=True)
class Comparison:
    """Running figures over positions of two models on the same tokens.

    Attributes:
        positions: predictions counted.
        nll_reference: sum of negative log likelihoods of the first model, nats.
        nll: the same of the second model.
        divergence: sum of KL(first || second), nats.
        agree: positions at which both find the same token most likely.
    """

    positions: int = 0
    nll_reference: float = 0.0
    nll: float = 0.0
    divergence: float = 0.0
    agree: int = 0

    def add(
        self, reference: Tensor, candidate: Tensor, following: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Add some positions to the sums.

        Args:
            reference: logits of the first model, `[positions, vocabulary]`.
            candidate: logits of the second model.
            following: the token that comes next at each position, `[positions]` int64.
            mask: `[positions]` bool, False where a position does not count.

        Returns:
            KL(first || second) of each position that counts, nats, `[positions] float64`.
        """
        if mask is not None:
            reference, candidate, following = reference[mask], candidate[mask], following[mask]
        first = reference.float().log_softmax(-1)
        second = candidate.float().log_softmax(-1)
        divergence = (first.exp() * (first - second)).sum(-1).double()
        index = following.unsqueeze(-1)
        self.positions += following.numel()
        self.nll_reference -= float(first.gather(-1, index).double().sum())
        self.nll -= float(second.gather(-1, index).double().sum())
        self.divergence += float(divergence.sum())
        self.agree += int((first.argmax(-1) == second.argmax(-1)).sum())
        return divergence

    @property
    def perplexity_reference(self) -> float:
        """Perplexity of the first model."""
        return _perplexity(self.nll_reference, self.positions)

    @property
    def perplexity(self) -> float:
        """Perplexity of the second model."""
        return _perplexity(self.nll, self.positions)

    @property
    def kl(self) -> float:
        """Mean KL(first || second), nats per token."""
        return self.divergence / max(1, self.positions)

    @property
    def agreement(self) -> float:
        """Share of positions with the same most likely token."""
        return self.agree / max(1, self.positions)


def _perplexity(nll: float, positions: int) -> float:
    return math.exp(min(nll / max(1, positions), 700.0))


def positions_at_once(vocabulary: int, budget_bytes: int = COMPARED_BYTES) -> int:
    """How many positions' logits to hold at a time: float32 log-probabilities of two models and their mix."""
    return max(1, budget_bytes // (vocabulary * torch.float32.itemsize * 4))
