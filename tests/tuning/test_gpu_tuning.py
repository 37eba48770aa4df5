"""Tuning on a GPU: every dtype of blocks, rows that stay on the host, the compiled step."""

from __future__ import annotations

import pytest
import torch

from accelerator import DEVICE, NEEDED, needs_cuda
from auto_round.pipeline.running.compile import compiled_objective
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.objective import PLAIN
from auto_round.tuning.samples import Samples
from auto_round.tuning.sign_round import tune_block
from tuning.blocks import Mlp, generator, samples, tasks

pytestmark = NEEDED


def tuned(dtype, *, home=DEVICE, objective=PLAIN, size=1.0, weights=None):
    """A block on the device under test, its rows at home there or on the host."""
    block = Mlp(dtype)
    with torch.no_grad():
        block.down.weight.mul_(size)
    data = samples(block)
    block.to(DEVICE)
    given = Samples(
        (data.inputs[0].to(home),),
        (data.targets[0].to(home),),
        weights=None if weights is None else (weights,),
    )
    result = tune_block(
        block,
        tasks(block),
        given,
        given,
        TuneConfig(iters=50, batch_size=4, rows_at_once=2),
        generator=generator(),
        objective=objective,
    )
    assert {q.codes.device.type for q in result.weights.values()} == {DEVICE}
    assert result.loss < result.initial_loss
    return result


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**-8)]
)
def test_blocks_of_16_bits(dtype, size):
    """Losses end near those of float32, also where gradients are tiny."""
    found, exact = tuned(dtype, size=size), tuned(torch.float32, size=size)
    assert found.loss < 0.5 * (exact.loss + exact.initial_loss)


def test_rows_on_the_host():
    """Where rows and their weights lie changes nothing."""
    weights = (torch.rand(32, 8, generator=generator(3)) - 0.2).clamp_min(0)
    here = tuned(torch.float32, home="cpu", weights=weights)
    there = tuned(torch.float32, weights=weights.to(DEVICE))
    assert here.loss == pytest.approx(there.loss, rel=1e-3)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_compiled_step(dtype):
    """Compiled, the loss ends where it ends without."""
    found, plain = tuned(dtype, objective=compiled_objective()), tuned(dtype)
    assert found.loss == pytest.approx(plain.loss, rel=0.2)
