"""A tuned block is no worse on held-out rows than the same ranges with codes whose errors cancel."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from auto_round.calibration.observe import observe_inputs
from auto_round.numerics.descent import cancelling_offsets
from auto_round.numerics.presets import int_format
from auto_round.numerics.presets_float import mx_format, nv_format
from auto_round.numerics.search import QUICK, THOROUGH, search_knobs
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.samples import Samples, run_block
from auto_round.tuning.sign_round import tune_block
from auto_round.tuning.steps import worth_cancelling
from auto_round.tuning.weights import WeightTask
from tuning.blocks import HIDDEN, LENGTH, W2, Mlp, generator

W4 = int_format(4, 16, sym=True)
TOO_FAR = TuneConfig(iters=2, lr=0.5)
"""Steps so large that none of them is better than the start."""


def together(block, rows, seed):
    """Inputs whose channels rise and fall together, as those of language models do."""
    x = torch.randn(rows, LENGTH, HIDDEN, generator=generator(seed))
    x = x @ (0.3 * torch.eye(HIDDEN) + torch.randn(HIDDEN, HIDDEN, generator=generator(9)) / HIDDEN**0.5)
    targets = torch.empty_like(x)
    run_block(block, Samples((x,), (x,)), (targets,), batch_size=8)
    return Samples((x,), (targets,))


def tune(block, fmt, config, products=True):
    data, held_out = together(block, 64, seed=1), together(block, 32, seed=2)
    with observe_inputs(block, ["up", "down"]) as seen:
        block(data.inputs[0])
    known = {f"{n}.weight": moments.importance() if products else None for n, moments in seen.items()}
    tasks = {n: WeightTask(fmt, importance=importance) for n, importance in known.items()}
    return tune_block(block, tasks, data, held_out, config, generator=generator()), known, held_out


def loss_of(block, weights, data):
    changed = copy.deepcopy(block)
    with torch.no_grad():
        for name, q in weights.items():
            changed.get_parameter(name).copy_(q.format.dequantize(q))
        return (changed(data.inputs[0]) - data.targets[0]).square().mean().item()


@pytest.mark.parametrize("fmt", [W4, mx_format("fp4"), nv_format()], ids=lambda fmt: fmt.name)
def test_cancelled_codes_are_kept_where_steps_find_nothing_better(fmt):
    block = Mlp()
    tuned, known, held_out = tune(block, fmt, TOO_FAR)
    cancelled = {}
    for name, importance in known.items():
        w = block.get_parameter(name)
        bound = fmt.bind(fmt.stats(w))
        knobs = search_knobs(bound, w, importance, QUICK)
        v = cancelling_offsets(bound, w, knobs, importance, THOROUGH.sweeps)
        cancelled[name] = bound.quantize(w, knobs, v)
        assert torch.equal(tuned.weights[name].codes, cancelled[name].codes)
    assert tuned.best_step == 0
    assert tuned.loss < 0.95 * tuned.initial_loss
    assert tuned.loss == pytest.approx(loss_of(block, cancelled, held_out), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "steps"), [(TuneConfig(iters=80), 1), (TuneConfig(iters=2, lr=0.5, keep_best=False), 2)]
)
def test_better_codes_are_kept_and_the_last_ones_where_that_is_asked_for(config, steps):
    block = Mlp()
    tuned, _, held_out = tune(block, W2, config)
    assert tuned.best_step >= steps
    assert tuned.loss == pytest.approx(loss_of(block, tuned.weights, held_out), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "products"),
    [
        (TOO_FAR, False),
        (TuneConfig(iters=2, lr=0.5, tune_rounding=False), True),
        (replace(TOO_FAR, try_cancelled=False), True),
    ],
    ids=["no products are known", "offsets are not tuned", "they are not to be tried"],
)
def test_the_start_is_kept_as_it_was(config, products):
    tuned, _, _ = tune(Mlp(), W4, config, products)
    assert tuned.loss <= tuned.initial_loss
    if tuned.best_step == 0:
        assert tuned.loss == tuned.initial_loss


def test_where_cancelled_codes_are_tried():
    three, four, eight, fp4 = (
        f.grid for f in (int_format(3, 16, sym=True), W4, int_format(8, 16, sym=True), nv_format())
    )
    assert not worth_cancelling(50, [three, four], rounds_inputs=False)
    assert worth_cancelling(49, [four], rounds_inputs=False)
    assert worth_cancelling(200, [four], rounds_inputs=True)
    assert worth_cancelling(200, [four, eight], rounds_inputs=False)
    assert worth_cancelling(200, [fp4], rounds_inputs=False)
