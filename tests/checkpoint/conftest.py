"""Tensors that every test here may use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auto_round.checkpoint.dtypes import DTYPES
from checkpoint.samples import random_tensor


@pytest.fixture(scope="session")
def zoo() -> dict[str, Tensor]:
    """One tensor of every dtype, and the awkward shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t.{name}": random_tensor(dtype, (3, 5), generator) for name, dtype in DTYPES.items()}
    tensors["scalar"] = random_tensor(torch.bfloat16, (), generator)
    tensors["empty"] = random_tensor(torch.float32, (0, 7), generator)
    tensors["odd"] = random_tensor(torch.uint8, (13,), generator)
    tensors["cube"] = random_tensor(torch.float16, (4, 3, 2), generator)
    return tensors
