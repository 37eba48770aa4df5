"""What is said of two models from the figures of all positions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from auto_round.evaluate.intervals import Resampling
from auto_round.evaluate.positions import TOP_K, Figures

QUANTILES: Final = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999}
CONFIDENCE: Final = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Bounds of the original's largest probability between which positions are counted together."""
WORST: Final = 5
"""Positions with the largest divergence that are named."""


def summarize(figures: Figures, resampling: Resampling) -> dict[str, Any]:
    """Figures of a comparison, as a tree of numbers; each estimate with `value`, `error`, `low` and `high`.

    Args:
        figures: of every position, see `positions.MEANINGS`.
        resampling: draws of these positions.
    """
    kl = figures["kl"]
    return {
        "positions": len(kl),
        "perplexity_original": resampling.of_means(torch.exp, figures["nll_original"]).to_dict(),
        "perplexity": resampling.of_means(torch.exp, figures["nll"]).to_dict(),
        "perplexity_ratio": resampling.of_means(
            torch.exp, figures["nll"] - figures["nll_original"]
        ).to_dict(),
        "kl": _distribution(kl, resampling),
        "kl_reverse": _distribution(figures["kl_reverse"], resampling),
        "probability_difference": {
            "mean": resampling.mean(figures["difference"]).to_dict(),
            "rms": resampling.of_means(torch.sqrt, figures["difference"].square()).to_dict(),
        },
        "same_top": resampling.mean(figures["same_top"]).to_dict(),
        "top_k": {str(k): resampling.mean(figures[f"top_{k}"]).to_dict() for k in TOP_K},
        "by_confidence": by_confidence(figures),
    }


def by_confidence(figures: Figures) -> list[dict[str, float]]:
    """Mean divergence and agreement where the original was less and more sure; empty ranges are left out."""
    bounds = torch.tensor(CONFIDENCE[1:-1], dtype=torch.float64, device="cpu")
    where = torch.bucketize(figures["confidence"], bounds, right=True)
    found = []
    for i, (low, high) in enumerate(pairwise(CONFIDENCE)):
        inside = where == i
        if count := int(inside.sum()):
            row = {"from": low, "to": high, "positions": count}
            row |= {name: float(figures[name][inside].mean()) for name in ("kl", "same_top")}
            found.append(row)
    return found


def halves(figures: Figures, rows: Tensor) -> dict[str, float]:
    """Mean divergence on every second row, and on the others: how much of it is the choice of text.

    Args:
        figures: of every position.
        rows: row of each position, `[positions]` int64.
    """
    odd = rows % 2 == 1
    kl = figures["kl"]
    return {"even_rows": float(kl[~odd].mean()), "odd_rows": float(kl[odd].mean())} if odd.any() else {}


def worst(kl: Tensor, rows: Tensor, tokens: Tensor) -> list[dict[str, float]]:
    """Where the divergence is largest.

    Args:
        kl: of each position, `[positions]`.
        rows: row of each position.
        tokens: place in its row of the token that each position predicts.
    """
    largest = kl.topk(min(WORST, len(kl)))
    return [
        {"row": int(rows[i]), "token": int(tokens[i]), "kl": float(value)}
        for value, i in zip(largest.values, largest.indices.tolist(), strict=True)
    ]


def _distribution(values: Tensor, resampling: Resampling) -> dict[str, Any]:
    found: dict[str, Any] = {"mean": resampling.mean(values).to_dict()}
    found |= {name: resampling.quantile(values, q).to_dict() for name, q in QUANTILES.items()}
    return found | {"largest": float(values.max())}
