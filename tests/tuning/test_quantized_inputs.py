"""Inputs are rounded while the context lasts, under functional_call too, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from auto_round.errors import ConfigError
from auto_round.numerics.activation import TokenInt
from auto_round.tuning.quantized_inputs import quantized_inputs

FMT = TokenInt(4, sym=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(input=x)))


def expected(block, x, weights):
    """The block by the same products of the same shapes: others give other last bits on some processors."""
    hidden = torch.relu(functional.linear(FMT.fake_quantize(x), weights["up.weight"]))
    return x + functional.linear(FMT.fake_quantize(hidden), weights["down.weight"])


def test_inputs_of_the_named_modules_only():
    block, x = Block(), torch.randn(2, 3, 32)
    weights = dict(block.named_parameters())
    plain = block(x)
    with quantized_inputs(block, {"up": FMT, "down": FMT}):
        assert torch.equal(block(x), expected(block, x, weights))
        other = {name: w.detach() * 2 for name, w in weights.items()}
        assert torch.equal(functional_call(block, other, (x,)), expected(block, x, other))
    assert torch.equal(block(x), plain)
    with quantized_inputs(block, {"down": FMT}):
        hidden = torch.relu(block.up(x))
        assert torch.equal(block(x), x + functional.linear(FMT.fake_quantize(hidden), block.down.weight))


def test_weights_in_front_get_a_gradient():
    block, x = Block(), torch.randn(2, 3, 32)
    with quantized_inputs(block, {"up": FMT, "down": FMT}):
        block(x).square().sum().backward()
    assert block.up.weight.grad.abs().max() > 0


def test_nothing_stays_behind_even_after_an_error():
    block = Block()
    state = {name: dict(module.__dict__) for name, module in block.named_modules()}
    with pytest.raises(RuntimeError), quantized_inputs(block, {"up": FMT}):
        raise RuntimeError
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert state.keys() == {name for name, _ in block.named_modules()}
    assert all(state[name].keys() == module.__dict__.keys() for name, module in block.named_modules())


def test_unknown_modules_are_named():
    with (
        pytest.raises(ConfigError, match='no module "dwon"; did you mean "down"'),
        quantized_inputs(Block(), {"dwon": FMT}),
    ):
        pass
