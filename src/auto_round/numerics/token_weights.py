"""How much the error of each token counts: less where its activations are massive.

In large language models a few tokens (the first of a row, as a rule) have hidden states whose mean square
is thousands of times that of others; attention uses them as a place to look at when there is nothing to see
("massive activations", arXiv 2402.17762; "attention sinks", arXiv 2309.17453). In a sum of squares they
would be all that is seen. So a token counts at most as much as one whose mean square is `CAP` times the
median of its row: such a token keeps a say, and the many others keep theirs. Only whole tokens are scaled,
never single channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CAP = 4.0
"""A token's mean square counts as at most so many medians of its row (measured: docs/LOG.md)."""
MASSIVE = 100.0
"""A token is called massive when its mean square is above so many medians of its row, that is ten times in
amplitude. Only reports use this."""


class Massive(NamedTuple):
    """Tokens with massive activations.

    Attributes:
        tokens: their share of all tokens that count, 0 ... 1.
        energy: their share of the sum of squares of all tokens that count, 0 ... 1.
    """

    tokens: float
    energy: float


def token_energy(x: Tensor) -> Tensor:
    """Mean square of each token of `[..., tokens, width]`: `[..., tokens]` float32."""
    return x.detach().float().square().mean(dim=-1)


def token_weights(energy: Tensor, mask: Tensor | None = None) -> Tensor:
    """Factor by which the squared error of each token is multiplied.

    A row is compared with itself alone, so the factors depend neither on other rows nor on how rows are put
    into batches.

    Args:
        energy: mean squares, `[..., tokens]` float32.
        mask: bool of the same shape on any device, False for tokens that do not count; None: all count.

    Returns:
        `[..., tokens]` float32 in 0 ... 1; 0 exactly where the mask is False, 1 for all tokens of a row most
        of whose tokens are 0.
    """
    mask = _beside(energy, mask)
    limit = CAP * _median(energy, mask)
    weights = torch.where((energy > limit) & (limit > 0), limit / energy, 1.0)
    return weights if mask is None else weights.masked_fill(~mask, 0.0)


def massive_tokens(energy: Tensor, mask: Tensor | None = None) -> Massive:
    """How many tokens are massive, and how much of the sum of squares they hold; arguments as above."""
    mask = _beside(energy, mask)
    counted = torch.ones_like(energy, dtype=torch.bool) if mask is None else mask
    median = _median(energy, mask)
    massive = (energy > MASSIVE * median) & (median > 0) & counted
    held = energy.masked_fill(~massive, 0.0).sum(dtype=torch.float64)
    total = energy.masked_fill(~counted, 0.0).sum(dtype=torch.float64)
    tokens = int(massive.sum()) / max(1, int(counted.sum()))
    return Massive(tokens, float(held / total) if total > 0 else 0.0)


def _median(energy: Tensor, mask: Tensor | None) -> Tensor:
    """Median over the tokens that count, `[..., 1]`; NaN for a row without any."""
    if not energy.shape[-1]:
        return energy.new_full((*energy.shape[:-1], 1), torch.nan)
    counted = energy if mask is None else energy.masked_fill(~mask, torch.nan)
    # Sorted, NaN last: PyTorch's median on GPUs is not deterministic, and refused where that is asked for.
    ordered = counted.sort(dim=-1).values
    middle = ((~counted.isnan()).sum(dim=-1, keepdim=True) - 1).clamp_min(0) // 2
    return ordered.gather(-1, middle)


def _beside(energy: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask where the energies are: rows may lie on an accelerator, masks lie on the host."""
    return None if mask is None else mask.to(energy.device)
