"""Weights that are no numbers: refused by name before a block is tuned."""

from __future__ import annotations

import math

import pytest
import torch

from auto_round.errors import NumericsError
from auto_round.pipeline.running.tune_group import refuse_not_finite


def group(bad: float, dtype: torch.dtype) -> torch.nn.Module:
    """A block with a stack of experts, a matrix and an empty parameter; the last expert has a bad weight."""
    block = torch.nn.Module()
    experts = torch.randn(3, 8, 8).to(dtype)
    experts[2, 4, 5] = bad
    tensors = {"experts": experts, "matrix": torch.randn(8, 8).to(dtype), "none": torch.empty(0, dtype=dtype)}
    for name, tensor in tensors.items():
        block.register_parameter(name, torch.nn.Parameter(tensor))
    whole = torch.nn.Module()
    whole.add_module("0", block)
    return whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_weight_is_named(bad: float, dtype: torch.dtype) -> None:
    with pytest.raises(NumericsError, match=r"layers\.7\.experts: 1 of 192 weights are NaN or infinite"):
        refuse_not_finite(group(bad, dtype), {"0": "layers.7"})


def test_the_largest_numbers_of_a_dtype_are_finite() -> None:
    refuse_not_finite(group(torch.finfo(torch.bfloat16).max, torch.bfloat16), {"0": "layers.7"})
