"""Steps of `SignedMax` by a C program on CPUs: the bits of its formula and its gradient, in one pass each."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.compiled import addresses, can_read, numeric_library, threads_for
from auto_round.numerics.scale import Knobs, Stats

SOURCE = Path(__file__).with_name("signed_max.c")

OPTIONS = ("-ffp-contract=off",)
"""A fused product is rounded once where PyTorch rounds twice."""


class _Ranges(ctypes.Structure):
    """`Ranges` of the program."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lo", "hi", "knob_lo", "knob_hi")),
        *((name, ctypes.c_float) for name in ("levels", "most", "vanishing", "normal")),
    )


def compiled_step(stats: Stats, levels: float, knobs: Knobs | None, dtype: torch.dtype) -> Tensor | None:
    """`legal_step` of the larger extreme over `levels`, float32, differentiable in the knobs.

    Args:
        stats: range of each group.
        levels: numbers of the side that has one more.
        knobs: range multipliers; None for 1.
        dtype: in which steps are stored.

    Returns:
        None where PyTorch has to do it: other devices or dtypes, gradients of gradients, no compiler.
    """
    given = (stats.lo, stats.hi) if knobs is None else (stats.lo, stats.hi, knobs.lo, knobs.hi)
    usable = can_read(*given) and all(x.dtype is torch.float32 and x.shape == stats.lo.shape for x in given)
    if not usable or stats.lo.requires_grad or stats.hi.requires_grad or _program() is None:
        return None
    if knobs is None:
        return _step(stats, levels, None, dtype)
    made: Tensor = _Step.apply(knobs.lo, knobs.hi, stats, levels, dtype)  # type: ignore[no-untyped-call]
    return made


class _Step(torch.autograd.Function):
    """The step, and its gradients in both knobs."""

    @staticmethod
    def forward(ctx: Any, lo: Tensor, hi: Tensor, stats: Stats, levels: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(lo, hi, stats.lo, stats.hi)
        ctx.levels, ctx.dtype = levels, dtype
        return _step(stats, levels, Knobs(lo, hi), dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lo, hi, *ranges = ctx.saved_tensors
        to_lo, to_hi = torch.empty_like(lo), torch.empty_like(hi)
        request = _request(Stats(*ranges), ctx.levels, Knobs(lo, hi), ctx.dtype)
        _run("signed_max_slopes", request, grad.contiguous(), to_lo, to_hi)
        wants_lo, wants_hi, *_ = ctx.needs_input_grad
        return to_lo if wants_lo else None, to_hi if wants_hi else None, None, None, None


def _step(stats: Stats, levels: float, knobs: Knobs | None, dtype: torch.dtype) -> Tensor:
    step = torch.empty_like(stats.lo)
    _run("signed_max", _request(stats, levels, knobs, dtype), step)
    return step.to(dtype).to(torch.float32)


def _request(stats: Stats, levels: float, knobs: Knobs | None, dtype: torch.dtype) -> _Ranges:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # below the normal numbers
    own = (None, None) if knobs is None else (knobs.lo, knobs.hi)
    # Half of the smallest number is rounded to 0, to the even one of its neighbours.
    return _Ranges(*addresses(stats.lo, stats.hi, *own), levels, info.max, smallest / 2, info.smallest_normal)


def _run(function: str, request: _Ranges, *tensors: Tensor) -> None:
    count = tensors[0].numel()
    ask = getattr(_program(), f"auto_round_{function}")
    ask(ctypes.byref(request), *addresses(*tensors), ctypes.c_int64(count), threads_for(count))


def _program() -> ctypes.CDLL | None:
    """The compiled program; None where it cannot be made."""
    return numeric_library(SOURCE, OPTIONS, "steps are found without a compiled program")
