"""Memory that large tensors of a step take in turn.

A tensor of many megabytes that is made anew leaves a hole when it is freed; small ones that come then settle
in it, and the next large one needs new memory. In 100 steps such holes took a sixth of a run's peak
(docs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """One piece of host memory, as large as the largest tensor that was asked for."""

    def __init__(self) -> None:
        self._memory = _host_bytes(0)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of any content, valid until the next one is asked for."""
        needed = math.prod(shape) * dtype.itemsize
        if len(self._memory) < needed:
            self._memory = _host_bytes(0)  # not to be held beside the new one
            self._memory = _host_bytes(needed)
        return self._memory[:needed].view(dtype).view(*shape)


def _host_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")
