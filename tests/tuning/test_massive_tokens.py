"""A token with massive activations, as large models have them at the start of each row, must not be all that
tuning sees."""

from __future__ import annotations

import torch

from auto_round.calibration.observe import observe_inputs
from auto_round.numerics import token_weights as rule
from auto_round.numerics.presets import int_format
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.samples import Samples, run_block
from auto_round.tuning.sign_round import tune_block
from auto_round.tuning.weights import WeightTask
from tuning.blocks import HIDDEN, LENGTH, Mlp, generator

FMT = int_format(2, 16, sym=True)


def with_a_sink(block, n, seed):
    """Rows whose first token has 40,000 times the mean square of others."""
    inputs = torch.randn(n, 4 * LENGTH, HIDDEN, generator=generator(seed))
    inputs[:, 0] *= 200.0
    targets = torch.empty_like(inputs)
    run_block(block, Samples((inputs,), (inputs,)), (targets,), batch_size=8)
    return inputs, targets


class Loud(Mlp):
    """Without a norm in front: what comes in large goes out large."""

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def tuned(block, *, weighted):
    """Blocks that are tuned with the weights of tokens, and without."""
    inputs, targets = with_a_sink(block, 48, seed=1)
    weights = rule.token_weights(rule.token_energy(targets)) if weighted else None
    with observe_inputs(block, ["up", "down"]) as seen, torch.no_grad():
        block(inputs)
    result = tune_block(
        block,
        {f"{n}.weight": WeightTask(FMT, importance=m.importance()) for n, m in seen.items()},
        Samples((inputs[:32],), (targets[:32],), weights=None if weights is None else (weights[:32],)),
        Samples((inputs[32:],), (targets[32:],), weights=None if weights is None else (weights[32:],)),
        TuneConfig(iters=60, batch_size=8),
        generator=generator(),
    )
    parameters = {n: q.format.dequantize(q) for n, q in result.weights.items()}
    unseen, wanted = with_a_sink(block, 32, seed=3)
    with torch.no_grad():
        found = torch.func.functional_call(block, parameters, (unseen,))
    return (found - wanted).square().mean(-1).mean(0), wanted.square().mean(-1).mean(0)


def test_ordinary_tokens_gain_and_the_massive_one_keeps_its_size():
    block = Loud(seed=5)
    robust, energy = tuned(block, weighted=True)
    blind, _ = tuned(block, weighted=False)
    assert energy[0] > 100 * energy[1:].median()
    assert robust[1:].mean() < 0.9 * blind[1:].mean()
    assert robust[0] < 0.3 * energy[0]


def test_the_search_before_tuning_sees_ordinary_tokens_too(monkeypatch):
    block = Loud(seed=5)
    robust, _ = tuned(block, weighted=True)
    monkeypatch.setattr(rule, "CAP", float("inf"))
    blind, _ = tuned(block, weighted=True)
    assert robust[1:].mean() < 0.9 * blind[1:].mean()
