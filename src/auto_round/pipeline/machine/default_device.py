"""PyTorch's default device, which belongs to the user and must not decide where a run computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def plain_device() -> Iterator[None]:
    """No default device while the context lasts, as far as what runs inside can tell; also a decorator.

    The code of models makes tensors without saying where. After `torch.set_default_device` some of them would
    lie on another device than the weights.
    """
    # Only where it is needed: a device as a context costs every call of PyTorch a little.
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if elsewhere else nullcontext():
        yield
