"""`quantize_block`: a block that somebody else runs, tuned in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auto_round import AutoRound
from auto_round.autoround.recorded import record
from auto_round.errors import ConfigError
from auto_round.schemes import parse_scheme


class Block(nn.Module):
    """Two layers, a mask by sample and a factor for all."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64)

    def forward(self, hidden, scale=None, *, mask=None, factors=()):
        hidden = hidden if mask is None else hidden * mask
        for factor in factors:
            hidden = hidden * factor
        out = hidden + self.down(torch.relu(self.up(hidden)))
        return (out if scale is None else out * scale,)


@pytest.fixture
def block():
    generator = torch.Generator().manual_seed(0)
    made = Block()
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return made


@pytest.fixture
def hidden():
    return torch.randn(16, 8, 64, generator=torch.Generator().manual_seed(1))


def calls(hidden, size=4):
    for start in range(0, len(hidden), size):
        rows = hidden[start : start + size]
        mask = torch.arange(start, start + len(rows)).float().view(-1, 1, 1)
        yield (rows, torch.tensor(2.0)), {"mask": mask, "factors": (torch.ones(1, 8, 1),)}


def tuner(**named):
    return AutoRound("m", scheme="W2A16", group_size=32, seqlen=8, iters=20, batch_size=4, **named)


def test_the_block_holds_values_of_the_grid_and_tuning_beats_rounding(block, hidden):
    original = {n: p.clone() for n, p in block.named_parameters()}
    reference = block(hidden)[0].detach()
    q_out, out = tuner(lr=0.05).quantize_block(block, hidden)
    assert torch.equal(out, reference)
    assert torch.equal(q_out, block(hidden)[0].detach())
    tuned = (q_out - reference).square().mean()

    for name, p in original.items():
        block.get_parameter(name).data.copy_(p)
    fmt = parse_scheme("W2A16", {"group_size": 32}).weight_format()
    for layer in (block.up, block.down):
        weight = layer.weight.detach().clone()
        layer.weight.data.copy_(fmt.dequantize(fmt.quantize(weight)))
    plain = (block(hidden)[0] - reference).square().mean()
    assert tuned < plain


def test_weights_lie_on_the_grid_and_biases_stay(block, hidden):
    bias = block.down.bias.clone()
    tuner().quantize_block(block, hidden)
    levels = [len(group.unique()) for group in block.up.weight.detach().reshape(-1, 32)]
    assert max(levels) <= 4
    assert torch.equal(block.down.bias, bias)
    assert not any(p.grad is not None for p in block.parameters())


def test_layer_config_and_ignored_layers(block, hidden):
    up = block.up.weight.detach().clone()
    tuner(ignore_layers="up", layer_config={"down": {"bits": 8}}).quantize_block(block, hidden)
    assert torch.equal(block.up.weight, up)
    assert max(len(g.unique()) for g in block.down.weight.detach().reshape(-1, 32)) > 4


def test_recorded_calls_give_each_sample_its_own_arguments(block, hidden):
    entries = list(calls(hidden))
    wanted = torch.cat([block(*args, **kwargs)[0] for args, kwargs in entries]).detach()
    recorded = record(block, entries)
    index = [5, 2, 11]
    call, _ = recorded.table(index).batch(0, range(3), torch.device("cpu"))
    args, kwargs = call.given((recorded.states[0][index],))
    assert torch.allclose(block(*args, **kwargs)[0], wanted[index])
    q_out, out = tuner().quantize_block(block, [(entry,) for entry in entries], q_input=hidden)
    assert torch.allclose(out, wanted)
    assert q_out.shape == wanted.shape


def test_same_seed_same_weights(block, hidden):
    start = {n: p.clone() for n, p in block.named_parameters()}
    first, _ = tuner(seed=3).quantize_block(block, hidden)
    for name, p in start.items():
        block.get_parameter(name).data.copy_(p)
    second, _ = tuner(seed=3).quantize_block(block, hidden)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ([], "at least one"),
        ([5], "recorded call"),
        ([((), {})], "recorded call"),
        ([torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)], "one shape"),
    ],
)
def test_wrong_inputs(block, inputs, text):
    with pytest.raises(ConfigError, match=text):
        tuner().quantize_block(block, inputs)


@pytest.mark.parametrize("scheme", ["FP8_STATIC", "NVFP4"])
def test_scales_of_inputs_are_calibrated_on_the_samples(block, hidden, scheme):
    """What lies far above them saturates; the outputs that are handed back are those of rounded inputs."""
    reference = block(hidden)[0].detach()
    made = AutoRound("m", scheme=scheme, seqlen=8, iters=0, disable_opt_rtn=True)
    q_out, out = made.quantize_block(block, hidden)
    assert torch.equal(out, reference)
    plain = block(hidden)[0].detach()
    assert not torch.equal(q_out, plain)
    error = (q_out - reference).square().mean() / reference.square().mean()
    assert 1e-6 < float(error) < 0.02
