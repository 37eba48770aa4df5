"""Rounding by the C program into memory that is there already."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from auto_round.numerics.compiled_rounding import CompiledRounding


def rounded_into(rounding: CompiledRounding, out: Tensor) -> None:
    """Write what `CompiledRounding.weights_in` gives, without gradients.

    Args:
        rounding: of a weight.
        out: where the rounded weight goes: of its shape, float32 or bfloat16, contiguous, on the host.
    """
    function = "round_to_half" if out.dtype is torch.bfloat16 else "round"
    rounding._run(function, ctypes.c_void_p(out.data_ptr()))
