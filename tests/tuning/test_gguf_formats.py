"""Formats of GGUF blocks are tuned like any other: better than the searched rounding on rows never seen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.numerics.search import QUICK
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.samples import Samples
from auto_round.tuning.sign_round import tune_block
from auto_round.tuning.weights import round_to_nearest
from tuning.blocks import generator, tasks

WIDTH, LENGTH = 256, 8


class Wide(nn.Module):
    """One layer whose rows are two whole blocks, with a residual."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        noise = torch.randn(self.mix.weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.mix.weight.copy_(noise * WIDTH**-0.5 * torch.linspace(0.3, 2, 2 * WIDTH))
        self.eval().requires_grad_(False)

    def forward(self, x):
        return x + self.mix(nn.functional.silu(torch.cat([x, -x], -1)))


def samples(block, n, seed):
    """Inputs that live near a few directions, as hidden states do, and the block's outputs."""
    basis = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(9))
    x = torch.randn(n, LENGTH, 24, generator=torch.Generator().manual_seed(seed)) @ basis / 5
    return Samples((x,), (block(x),))


def loss_of(block, weights, data):
    changed = copy.deepcopy(block)
    for name, q in weights.items():
        changed.get_parameter(name).copy_(q.format.dequantize(q))
    return (changed(data.inputs[0]) - data.targets[0]).square().mean().item()


@pytest.mark.parametrize("name", ["q4_1", "q2_k", "q3_k", "q4_k", "q6_k"])
def test_tuning_beats_searched_rounding(name):
    block, fmt = Wide(), GGUF_FORMATS[name]
    data, held_out, unseen = (samples(block, n, seed) for n, seed in ((48, 1), (16, 2), (16, 3)))

    def weights(iters):
        config = TuneConfig(iters=iters, batch_size=16)
        return tune_block(block, tasks(block, fmt), data, held_out, config, generator=generator()).weights

    tuned, searched = (loss_of(block, weights(iters), unseen) for iters in (40, 0))
    assert tuned < 0.95 * searched


@pytest.mark.parametrize(("name", "stays"), [("q2_k", True), ("q3_k", True), ("q4_1", False)])
def test_ranges_of_groups_that_share_a_number_stay_as_searched(name, stays):
    block, fmt = Wide(), GGUF_FORMATS[name]
    data = samples(block, 48, 1)
    config = TuneConfig(iters=20, batch_size=16)
    tuned = tune_block(block, tasks(block, fmt), data, samples(block, 16, 2), config, generator=generator())
    assert tuned.best_step > 0
    searched = round_to_nearest(block.mix.weight, fmt, None, QUICK)
    found = tuned.weights["mix.weight"]
    same = [torch.equal(part, searched.scale.parts[key]) for key, part in found.scale.parts.items()]
    assert all(same) is stays
    assert not torch.equal(found.codes, searched.codes)
