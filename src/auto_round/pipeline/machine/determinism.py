"""PyTorch's deterministic GPU kernels, for the length of a run. On a CPU runs are deterministic anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_kernels(*, wanted: bool) -> Iterator[None]:
    """Use deterministic kernels inside the context when wanted; restores the caller's choice afterwards.

    cuBLAS also needs `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the environment; PyTorch says so if it is missing.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
