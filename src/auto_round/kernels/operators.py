"""Functions of kernels as operators, which `torch.compile` calls without looking inside.

An eager call does without: it costs 2 microseconds more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("auto_round", "FRAGMENT")  # type: ignore[no-untyped-call]  # kept: it owns them


ANY_DEVICE = "CompositeExplicitAutograd"
"""Dispatch key of functions for tensors on every device."""


def register_operator(
    schema: str, run: Callable[..., Tensor], shape: Callable[..., Tensor], key: str = "CPU"
) -> None:
    """Make a function known as `torch.ops.auto_round.<name>`.

    Args:
        schema: `name(Tensor x, ...) -> Tensor`, PyTorch's notation.
        run: the function; it changes none of its arguments.
        shape: a tensor like its result, from the same arguments, without data.
        key: PyTorch's dispatch key of the devices that it runs on.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"auto_round::{name}", shape, lib=_LIBRARY)
