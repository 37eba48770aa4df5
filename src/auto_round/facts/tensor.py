"""A stored tensor without its numbers, and what its dtype is called."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MATRIX = 2
"""Axes of a matrix."""
STACK = 3
"""Axes of a tensor that holds the matrices of all experts, `[n_experts, ...]`."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of them."""
        return self.count * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype as configurations and options write it, for example `bfloat16`."""
    return str(dtype).removeprefix("torch.")
