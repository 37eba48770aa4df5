"""The last block judged by what follows it: the divergence, its gradient, and what tuning makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from auto_round.tuning.config import TuneConfig
from auto_round.tuning.objective import Objective
from auto_round.tuning.predictions import Predictions
from auto_round.tuning.samples import Samples
from auto_round.tuning.sign_round import tune_block
from tuning.blocks import HIDDEN, W2, Mlp, generator, samples, tasks

VOCABULARY = 50


def tail(seed=7):
    """Norm and head that look at few directions of the hidden states."""
    torch.manual_seed(seed)
    narrow = nn.Linear(HIDDEN, 3, bias=False)
    return nn.Sequential(nn.LayerNorm(HIDDEN), narrow, nn.Linear(3, VOCABULARY)).requires_grad_(False)


def shaken(block):
    """Another last matrix."""
    return block.down.weight + 0.2 * torch.randn(block.down.weight.shape, generator=generator(5))


def divergence(finish, target, output, mask=None):
    """Mean KL over positions, written down as the definition has it."""
    p, q = finish(target).softmax(-1), finish(output).softmax(-1)
    each = (p * (p.log() - q.log())).sum(-1)
    return each.mean() if mask is None else each[mask].mean()


def loss(predictions, block, parameters, data, mask=None):
    device = data.targets[0].device
    masked = Samples(data.inputs, data.targets, weights=None if mask is None else (mask,))
    index = range(len(data))
    return predictions(block, parameters, masked.batch(index, masked.counts(index, device), device))


@pytest.mark.parametrize("at_once", [1, 7, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_the_divergence(at_once, masked):
    block, finish = Mlp(), tail()
    data = samples(block, 4)
    mask = torch.rand(data.inputs[0].shape[:2], generator=generator()) < 0.6 if masked else None
    weight = shaken(block).requires_grad_()
    found = loss(Predictions(finish, at_once), block, {"down.weight": weight}, data, mask)
    (gradient,) = torch.autograd.grad(found, weight)
    changed = torch.func.functional_call(block, {"down.weight": weight}, data.inputs)
    expected = divergence(finish, data.targets[0], changed, mask)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    assert expected > 0.01
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_what_stands_at_padding_has_no_influence():
    block, finish = Mlp(), tail()
    data = samples(block, 4)
    mask = torch.ones(data.inputs[0].shape[:2], dtype=torch.bool)
    mask[:, -2:] = False
    other = {"down.weight": shaken(block)}
    before = loss(Predictions(finish, 16), block, other, data, mask)
    data.targets[0][:, -2:] = torch.nan
    assert torch.equal(loss(Predictions(finish, 16), block, other, data, mask), before)


def test_nothing_is_lost_where_nothing_is_changed():
    block = Mlp()
    assert abs(loss(Predictions(tail(), 16), block, {}, samples(block, 4)).item()) < 1e-6


def test_parts_of_a_batch_add_up():
    block, finish = Mlp(), tail()
    data = samples(block, 6)
    predictions, other = Predictions(finish, 16), {"down.weight": shaken(block)}
    device = data.targets[0].device
    counts = data.counts(range(6), device)
    parts = [predictions(block, other, data.batch([i, i + 1], counts, device)) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), loss(predictions, block, other, data))


def test_a_block_tuned_by_predictions_predicts_better_and_may_differ_more():
    block, finish = Mlp(), tail()
    data, held_out, unseen = samples(block), samples(block, 16, seed=2), samples(block, 64, seed=3)

    def tuned(**named):
        made = tune_block(
            block, tasks(block, W2), data, held_out, TuneConfig(iters=60), generator=generator(), **named
        )
        output = _with(block, made)(unseen.inputs[0])
        error = (output - unseen.targets[0]).square().mean().item()
        return divergence(finish, unseen.targets[0], output).item(), error, made

    judge = Predictions(finish, 64)
    by_output, least_error, _ = tuned()
    by_predictions, error, made = tuned(objective=Objective(loss=judge, judge=judge))
    assert by_predictions < 0.7 * by_output
    assert error > least_error
    reached = divergence(finish, held_out.targets[0], _with(block, made)(held_out.inputs[0])).item()
    assert made.loss == pytest.approx(reached, rel=1e-3)  # also what chooses the best step
    assert made.loss < made.initial_loss


def _with(block, made):
    changed = copy.deepcopy(block)
    with torch.no_grad():
        for name, q in made.weights.items():
            changed.get_parameter(name).copy_(q.format.dequantize(q))
    return changed.requires_grad_(False)
