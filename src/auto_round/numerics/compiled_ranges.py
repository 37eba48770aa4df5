"""Smallest and largest weight of each group by a C program on CPUs."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from auto_round.compiled import addresses, can_read, numeric_library, threads_for
from auto_round.numerics.group import Group

SOURCE = Path(__file__).with_name("ranges.c")

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def compiled_ranges(group: Group, w: Tensor) -> tuple[Tensor, Tensor] | None:
    """Smallest and largest weight of each group, without the zeros that fill up a short one.

    Args:
        group: cuts the weight.
        w: `[..., out, in]`.

    Returns:
        Both float32 `[..., out, n_groups]`; a group with infinities or NaN has one in either. None where
        PyTorch has to do it: groups of several rows, other dtypes and devices, no compiler.
    """
    usable = can_read(w) and group.rows == 1 and group.size != 0 and w.dtype in _NAMES and w.numel()
    program = numeric_library(SOURCE, (), "ranges are found without a compiled program") if usable else None
    if program is None:
        return None
    length = w.shape[-1]
    lo, hi = (torch.empty(group.scale_shape(w.shape), dtype=w.dtype, device="cpu") for _ in range(2))
    sizes = map(ctypes.c_int64, (w.numel() // length, length, group.width(length)))
    ask = getattr(program, f"auto_round_ranges_{_NAMES[w.dtype]}")
    ask(*addresses(w, lo, hi), *sizes, threads_for(w.numel()))
    return lo.float(), hi.float()
