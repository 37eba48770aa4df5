"""The device of tests marked `gpu`, and how these tests are rehearsed where there is none.

With `TRITON_INTERPRET=1` they run on the CPU, where Triton's interpreter takes the place of its compiler:
fewer cases and smaller ones, so that a mistake in a test shows before somebody has a GPU at hand.
"""

from __future__ import annotations

import os

import pytest
import torch

REHEARSED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
"""Whether the CPU stands in for the GPU."""

DEVICE = "cpu" if REHEARSED else "cuda"

NEEDED = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REHEARSED and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
"""Marks of a file of such tests."""

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
"""For tests that the interpreter cannot rehearse."""


def fewer(cases: list, rehearsed: int) -> list:
    """All cases on a GPU, some of them spread evenly over the list in a rehearsal."""
    return cases[:: max(1, len(cases) // rehearsed)] if REHEARSED else cases
