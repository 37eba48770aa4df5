"""What rounding errors cost: second moments of the inputs that a weight is multiplied by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.group import Group

TILE = 128
"""Channels whose products are kept: the usual group size, and cheap beside the layer itself."""

_LEAST = 1e-4
"""Least importance of a channel, as a share of the mean, so that every weight counts."""


@dataclass(frozen=True, slots=True)
class Importance:
    """Second moments of the inputs of a linear layer.

    An error `e` of a row of weights changes the layer's output by `sum(e * x)`, whose mean square is
    `e @ mean(x x') @ e`. The diagonal is what llama.cpp calls an importance matrix; the products of
    neighbouring channels tell in addition which errors cancel.

    Attributes:
        squares: mean square of each input channel, `[in]` float32, not negative.
        products: mean products of channels inside of each tile of `TILE`, `[n_tiles, TILE, TILE]` float32,
            the last tile filled with 0; None where only the squares are known.
    """

    squares: Tensor
    products: Tensor | None = None

    def matrix(self, index: int) -> Importance:
        """Importance for one matrix of a stack, all of which see the same inputs: this one."""
        del index
        return self

    @property
    def mean(self) -> Tensor:
        """Mean of the squares."""
        return self.squares.to(torch.float32).mean()

    @property
    def usable(self) -> bool:
        """Whether it tells channels apart: a finite positive mean."""
        return bool(torch.isfinite(self.mean)) and bool(self.mean > 0)

    def weights(self, device: torch.device) -> Tensor:
        """Squares with mean 1, zeros lifted, `[in]` float32."""
        squares = self.squares.to(device=device, dtype=torch.float32)
        return (squares / squares.mean()).clamp_min(_LEAST)

    def tiles(self, device: torch.device) -> Tensor | None:
        """Products inside of each tile in units of the mean square, `[n_tiles, TILE, TILE]` float32.

        Channels that fill the last tile have a square of 1 and nothing in common with others. None where
        products are not known.
        """
        if self.products is None:
            return None
        products = self.products.to(device) / self.mean.to(device)
        diagonal = products.diagonal(dim1=1, dim2=2)
        least = torch.ones(diagonal.numel(), dtype=torch.float32, device=device)
        least[: self.squares.shape[0]] = _LEAST
        diagonal.copy_(torch.maximum(diagonal, least.reshape(diagonal.shape)))
        return products

    def pieces(self, group: Group, device: torch.device) -> Tensor | None:
        """Products inside of each group, in units of the mean square.

        Returns:
            `[n_groups * k, width, width]` float32 where each group consists of `k` neighbouring pieces; None
            without products, for groups of several rows, or when groups and tiles don't meet at their ends.
        """
        n_in = self.squares.shape[0]
        width = group.width(n_in)
        if self.products is None or group.size == 0 or group.rows > 1:
            return None
        products = self.products.to(device)
        if width < TILE:
            if TILE % width:
                return None
            tiles, each = products.shape[0], TILE // width
            inside = products.reshape(tiles, each, width, each, width).diagonal(dim1=1, dim2=3)
            products = inside.permute(0, 3, 1, 2).reshape(-1, width, width)[: group.count(n_in)]
        elif width % TILE and group.count(n_in) > 1:
            return None
        products = products / self.mean.to(device)
        diagonal = products.diagonal(dim1=1, dim2=2)
        least = torch.zeros(diagonal.numel(), dtype=torch.float32, device=device)
        least[:n_in] = _LEAST
        diagonal.copy_(torch.maximum(diagonal, least.reshape(diagonal.shape)))
        return products


@dataclass(frozen=True, slots=True)
class StackImportance:
    """Second moments for a stack of matrices each of which sees inputs of its own, as experts do.

    Attributes:
        matrices: importance for each matrix; None where nothing was seen.
    """

    matrices: tuple[Importance | None, ...]

    @property
    def squares(self) -> Tensor:
        """Mean square of each input channel of each matrix, `[n_matrices, in]` float32; 0 where unseen."""
        known = next(each.squares for each in self.matrices if each is not None)
        return torch.stack([torch.zeros_like(known) if m is None else m.squares for m in self.matrices])

    def matrix(self, index: int) -> Importance | None:
        """Importance for one matrix of the stack."""
        return self.matrices[index]


AnyImportance = Importance | StackImportance
"""What the matrices of a weight `[..., out, in]` see: all the same inputs, or each its own."""
