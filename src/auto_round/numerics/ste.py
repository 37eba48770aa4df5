"""Straight-through operations: the forward value is exact, the gradient passes unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Round(torch.autograd.Function):
    """`x + (round(x) - x)` does not give back `round(x)` in float32, hence a function of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def round_ste(x: Tensor) -> Tensor:
    """Nearest whole number, ties to even; gradient 1."""
    return _Round.apply(x) if x.requires_grad else torch.round(x)  # type: ignore[no-untyped-call]


def cast_ste(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype` and widened again to its own dtype; gradient 1."""
    return _Cast.apply(x, dtype) if x.requires_grad else x.to(dtype).to(x.dtype)  # type: ignore[no-untyped-call]
