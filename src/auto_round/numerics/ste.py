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


class _Clamp(torch.autograd.Function):
    """PyTorch's own gives numbers at the very end the gradient 1 up to 2.13, and 0 in 2.15.

    Zero points and multiples of shared numbers lie at the ends often, and have to stay able to leave them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lo: float, hi: float) -> Tensor:
        ctx.save_for_backward((x >= lo) & (x <= hi))
        return x.clamp(lo, hi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


def round_ste(x: Tensor) -> Tensor:
    """Nearest whole number, ties to even; gradient 1."""
    return _Round.apply(x) if x.requires_grad else torch.round(x)  # type: ignore[no-untyped-call]


def cast_ste(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype` and widened again to its own dtype; gradient 1."""
    return _Cast.apply(x, dtype) if x.requires_grad else x.to(dtype).to(x.dtype)  # type: ignore[no-untyped-call]


def clamp_ste(x: Tensor, lo: float, hi: float) -> Tensor:
    """`x` within `lo ... hi`; gradient 1 there, both ends included, and 0 outside, in every PyTorch."""
    return _Clamp.apply(x, lo, hi) if x.requires_grad else x.clamp(lo, hi)  # type: ignore[no-untyped-call]


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad if slope is None else grad * slope, None, None


def replace_ste(x: Tensor, y: Tensor, slope: Tensor | None = None) -> Tensor:
    """`y`, a constant, with the gradient passed to `x`, times `slope` if one is given."""
    return _Replace.apply(x, y, slope) if x.requires_grad else y  # type: ignore[no-untyped-call]
