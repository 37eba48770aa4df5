"""Groups: which weights of a tensor share a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Group:
    """Cuts the last axis of a weight `[..., out, in]` into groups.

    Attributes:
        size: weights in a group; -1 one group for each row (output channel), 0 one group for the
            whole matrix. A size above the row's length means one group for each row. When the size does not
            divide the row, the last group is short.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < -1:
            raise ConfigError(f"group_size must be -1 (row), 0 (tensor) or positive, got {self.size}")

    def width(self, n_in: int) -> int:
        """Weights in a full group of a row of `n_in`; for size 0 the row's own length."""
        return n_in if self.size <= 0 or self.size > n_in else self.size

    def count(self, n_in: int) -> int:
        """Groups in a row of `n_in` weights."""
        return -(-n_in // self.width(n_in))

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales of a weight of `shape`: `[..., out, n_groups]`, `[..., 1, 1]` for size 0."""
        if self.size == 0:
            return (*shape[:-2], 1, 1)
        return (*shape[:-1], self.count(shape[-1]))

    def split(self, w: Tensor, pad: float = 0.0) -> Tensor:
        """View or copy as `[..., rows, n_groups, width]`; a short last group is filled with `pad`."""
        if self.size == 0:
            return w.reshape(*w.shape[:-2], 1, 1, w.shape[-2] * w.shape[-1])
        n_in = w.shape[-1]
        width, count = self.width(n_in), self.count(n_in)
        missing = width * count - n_in
        if missing:
            w = torch.nn.functional.pad(w, (0, missing), value=pad)
        return w.reshape(*w.shape[:-1], count, width)

    def join(self, grouped: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of `split` for a weight of `shape`."""
        if self.size == 0:
            return grouped.reshape(*shape)
        flat = grouped.reshape(*grouped.shape[:-2], grouped.shape[-2] * grouped.shape[-1])
        return flat[..., : shape[-1]]
