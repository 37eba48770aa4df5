"""How the divergence is spread over positions: counts in fixed bins, so that runs can be compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FIRST_POWER, LAST_POWER, BINS_PER_DECADE = -8, 2, 4
"""Bins reach from 1e-8 to 1e2 nats, four to a decade: float32 logits resolve less than that below, and no
prediction is off by more than that above."""
N_BINS = (LAST_POWER - FIRST_POWER) * BINS_PER_DECADE


@dataclass(slots=True)
class Histogram:
    """Positions by the divergence of their predictions.

    Attributes:
        counts: positions in each bin; the first and the last also hold what lies beyond, the last NaN too.
    """

    counts: list[int] = field(default_factory=lambda: [0] * N_BINS)

    def add(self, divergence: Tensor) -> None:
        """Count positions in their bins.

        Args:
            divergence: of each position, nats, `[positions]`.
        """
        inside = divergence.double().nan_to_num(nan=torch.inf).clamp(10.0**FIRST_POWER, 10.0**LAST_POWER)
        place = ((inside.log10() - FIRST_POWER) * BINS_PER_DECADE).long().clamp(0, N_BINS - 1)
        found = torch.bincount(place, minlength=N_BINS).tolist()
        self.counts = [before + new for before, new in zip(self.counts, found, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """`positions` in each bin; bin `i` begins at `10 ** (first_power + i / bins_per_decade)` nats."""
        return {
            "first_power": FIRST_POWER,
            "bins_per_decade": BINS_PER_DECADE,
            "positions": list(self.counts),
        }
