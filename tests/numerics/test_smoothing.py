"""Factors of channels."""

from __future__ import annotations

import pytest
import torch

from auto_round.numerics.smoothing import LARGEST, Rescaling, channel_factors, held_factors


@pytest.mark.parametrize("plus", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_falls_by_just_the_factors_that_its_readers_are_multiplied_by(plus, dtype):
    generator = torch.Generator().manual_seed(0)
    wanted = LARGEST ** (2 * torch.rand(512, generator=generator) - 1)
    weight = (1 - plus + 0.3 * torch.randn(512, generator=generator)).to(dtype)
    weight[:2] = -plus  # a channel that is always 0
    real = held_factors(wanted, weight, dtype, plus)
    stored = Rescaling(divided=real, plus=plus).of(weight)
    assert stored.dtype == dtype
    product = (stored.double() + plus) * real.double()
    assert torch.allclose(product, weight.double() + plus, rtol=1e-5, atol=0)
    assert torch.equal(real[:2], torch.ones(2))
    assert float((real / wanted)[2:].log().abs().median()) < 0.01


def test_no_channel_vanishes():
    """1/256 divided by 16 cannot be told from 0 beside a 1 in bfloat16: that channel stays as it is."""
    weight = torch.tensor([-1 + 2**-8], dtype=torch.bfloat16)
    factor = held_factors(torch.tensor([LARGEST]), weight, torch.bfloat16, 1.0)
    assert float(factor) == 1
    assert float(Rescaling(divided=factor, plus=1.0).of(weight)) == float(weight)


def test_factors_of_channels():
    inputs, weights = torch.tensor([1.0, 256.0, 16.0]), torch.tensor([1.0, 1.0, 16.0])
    both = channel_factors(inputs, weights, 0.5)  # a ** 0.5 / w ** 0.5 with a = 1, 16, 4 and w = 1, 1, 4
    assert torch.allclose(both, torch.tensor([1.0, 4.0, 1.0]) / 4 ** (1 / 3))
    alone = channel_factors(inputs, None, 0.5)  # a ** 0.5
    assert torch.allclose(alone, torch.tensor([0.5, 2.0, 1.0]))
    assert torch.equal(channel_factors(inputs, None, 0.0), torch.ones(3))


@pytest.mark.parametrize("asleep", ["inputs", "columns"])
def test_channels_that_are_always_0_leave_the_others_as_they_would_be(asleep):
    """Half of the neurons behind a ReLU may sleep on all rows: they must not push the rest to the end."""
    generator = torch.Generator().manual_seed(0)
    inputs, weights = (torch.rand(64, generator=generator) + 0.1 for _ in range(2))
    alone = channel_factors(inputs, weights, 0.5)
    nothing, something = torch.zeros(64), torch.ones(64)
    beside = (inputs, weights), (nothing, something) if asleep == "inputs" else (something, nothing)
    found = channel_factors(*map(torch.cat, zip(*beside, strict=True)), 0.5)
    assert torch.allclose(found[:64], alone)
    assert torch.equal(found[64:], torch.ones(64))
    assert torch.equal(channel_factors(nothing, None, 0.25), torch.ones(64))


def test_numbers_that_are_none_spoil_no_factor():
    inputs = torch.tensor([1.0, float("nan"), 256.0])
    assert torch.equal(channel_factors(inputs, None, 0.5), torch.tensor([0.5, 1.0, 2.0]))
