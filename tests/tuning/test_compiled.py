"""The compiled objective gives the plain one's loss and gradients."""

from __future__ import annotations

import shutil

import pytest
import torch

from auto_round.pipeline.running.compile import compiled_objective
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.objective import PLAIN
from auto_round.tuning.sign_round import tune_block
from tuning.blocks import W2, Mlp, samples, tasks


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_tuning_ends_where_plain_tuning_ends() -> None:
    block = Mlp()
    data = samples(block)
    config = TuneConfig(iters=20)
    results = [
        tune_block(block, tasks(block, W2), data, data, config, generator=torch.Generator(), objective=o)
        for o in (PLAIN, compiled_objective())
    ]
    assert results[1].loss == pytest.approx(results[0].loss, rel=0.05)
    assert results[1].loss < results[1].initial_loss
