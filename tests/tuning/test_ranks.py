"""A block tuned by several ranks: the bits of one, by rows; up to the order of sums, otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from auto_round.ranks.ranks import ALONE
from auto_round.tuning.config import Optimizer, TuneConfig
from auto_round.tuning.objective import PLAIN
from auto_round.tuning.sign_round import tune_block
from ranks.threads import together
from tuning.blocks import Experts, Mlp, generator, samples, tasks

BY_ROW = TuneConfig(iters=6, batch_size=7, by_row=True, keep_best=False, search=False)


def tuned(make, config, ranks=ALONE):
    block = make()
    data, held_out = samples(block, 13), samples(block, 5, seed=2)
    return tune_block(
        block,
        tasks(block),
        data,
        held_out,
        config,
        generator=generator(),
        objective=replace(PLAIN, ranks=ranks),
    )


def equal(a, b):
    codes = all(torch.equal(a.weights[n].codes, q.codes) for n, q in b.weights.items())
    others = all(torch.equal(a.others[n], value) for n, value in b.others.items())
    losses = [str((each.initial_loss, each.loss, each.best_step)) for each in (a, b)]
    return codes and others and losses[0] == losses[1]


CASES = {
    "sign": (Mlp, BY_ROW),
    "norms, Adam": (Mlp, replace(BY_ROW, optimizer=Optimizer.ADAM, tune_norm_bias=True)),
    "several batches a step, momentum": (Mlp, replace(BY_ROW, accumulate=3, momentum=0.5, batch_size=3)),
    "searched, the best step": (Mlp, replace(BY_ROW, search=True, keep_best=True, iters=12)),
    "experts that few rows reach": (lambda: Experts(threshold=0.45), BY_ROW),
    "float16": (lambda: Mlp(torch.float16), BY_ROW),
    "rounded only": (Mlp, replace(BY_ROW, iters=0, search=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_by_row_any_number_of_ranks_comes_to_the_bits_of_one(case):
    make, config = CASES[case]
    alone = tuned(make, config)
    for size in (2, 3):
        for each in together(size, lambda ranks: tuned(make, config, ranks)):
            assert equal(each, alone)


@pytest.mark.parametrize("at_once", [0, 2])
def test_otherwise_all_ranks_agree_and_are_near_one(at_once):
    config = replace(BY_ROW, by_row=False, rows_at_once=at_once, batch_size=8)
    alone = tuned(Mlp, config)
    first, *others = together(3, lambda ranks: tuned(Mlp, config, ranks))
    assert all(equal(first, other) for other in others)
    assert first.loss == pytest.approx(alone.loss, rel=0.02)


def test_one_process_is_as_ever_without_the_fixed_order():
    config = replace(BY_ROW, by_row=False)
    assert equal(tuned(Mlp, config), *together(1, lambda ranks: tuned(Mlp, config, ranks)))


def test_by_row_the_rows_at_once_change_nothing():
    assert equal(tuned(Mlp, replace(BY_ROW, rows_at_once=4)), tuned(Mlp, BY_ROW))
