"""Means and quantiles over positions, with how far another text of the same kind would move them.

Neighbouring positions are alike, so whole blocks of them are drawn again, not single ones (block bootstrap,
Künsch 1989): each resample takes as many blocks as there are, with repetition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

import torch
from torch import Tensor

RESAMPLES: Final = 1000
FEW_BLOCKS: Final = 20
"""With fewer rows than this, rows are cut into shorter blocks: an interval needs some blocks to draw from."""
SHORTEST_BLOCK: Final = 32
"""Positions of the shortest block: dependence within a text reaches about as far."""
SHARE: Final = 0.95
"""Share of the resamples inside an interval."""
CPU: Final = torch.device("cpu")
_AT_ONCE: Final = 1 << 24
"""Weights of positions held at a time while quantiles are drawn again, 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and what is known of it.

    Attributes:
        value: over all positions.
        error: standard error.
        low: lower end of the interval of 95 %.
        high: upper end.
    """

    value: float
    error: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """As plain numbers."""
        return asdict(self)


class Resampling:
    """Draws of blocks, the same for every figure: so ratios and differences are drawn as pairs.

    Args:
        blocks: number of the block of each position, `[positions]` int64, from 0 without gaps.
        generator: source of the draws.
        times: number of resamples.
    """

    def __init__(self, blocks: Tensor, generator: torch.Generator, times: int = RESAMPLES) -> None:
        self._blocks = blocks
        self._sizes = torch.bincount(blocks).double()
        count = len(self._sizes)
        draws = torch.randint(count, (times, count), generator=generator, dtype=torch.int64, device=CPU)
        ones = torch.ones(times, count, dtype=torch.float64, device=CPU)
        self._counts = torch.zeros_like(ones).scatter_add_(1, draws, ones)

    def means(self, values: Tensor) -> Tensor:
        """Mean of `[positions]` values in each resample, `[times]` float64."""
        sums = torch.zeros_like(self._sizes).index_add_(0, self._blocks, values.double())
        return (self._counts @ sums) / (self._counts @ self._sizes)

    def mean(self, values: Tensor) -> Estimate:
        """Mean of `[positions]` values."""
        return _estimate(float(values.double().mean()), self.means(values))

    def of_means(self, function: Callable[..., Tensor], *values: Tensor) -> Estimate:
        """A function of the means of several `[positions]` values, such as a perplexity."""
        whole = function(*(v.double().mean() for v in values))
        return _estimate(float(whole), function(*(self.means(v) for v in values)))

    def quantile(self, values: Tensor, share: float) -> Estimate:
        """The number below which a share of the `[positions]` values lie."""
        ordered, order = values.double().sort()
        block_of = self._blocks[order]
        found = []
        step = max(1, _AT_ONCE // len(values))
        for start in range(0, len(self._counts), step):
            counts = self._counts[start : start + step]
            reached = counts[:, block_of].cumsum(-1)
            wanted = share * reached[:, -1:]
            index = torch.searchsorted(reached, wanted).clamp_(max=len(values) - 1)
            found.append(ordered[index.squeeze(-1)])
        return _estimate(interpolated(ordered, share), torch.cat(found))


def interpolated(ordered: Tensor, share: float) -> float:
    """Quantile of sorted values with linear interpolation, as `torch.quantile` without its limit of 2^24."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    first, second = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return first + (place - below) * (second - first)


def block_numbers(rows: int, positions: int) -> Tensor:
    """Block of each position of `rows` rows with `positions` each, `[rows * positions]` int64.

    A row is a block where there are many rows, else a piece of one.
    """
    pieces = 1
    if rows < FEW_BLOCKS:
        pieces = max(1, min(math.ceil(FEW_BLOCKS / rows), positions // SHORTEST_BLOCK))
    length = math.ceil(positions / pieces)
    within = torch.arange(positions, dtype=torch.int64, device=CPU) // length
    number = torch.arange(rows, dtype=torch.int64, device=CPU)[:, None] * (int(within[-1]) + 1) + within
    return number.flatten()


def _estimate(value: float, resampled: Tensor) -> Estimate:
    ordered = resampled.sort().values
    edge = (1 - SHARE) / 2
    error = float(resampled.std()) if len(resampled) > 1 else math.nan
    return Estimate(value, error, interpolated(ordered, edge), interpolated(ordered, 1 - edge))
