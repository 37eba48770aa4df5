"""A tuning step is compiled once for each kind of block, and only where that pays."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from auto_round.config import build_options
from auto_round.pipeline import quantize as main_job
from auto_round.pipeline.deciding import compiling
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.running import compile as running
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.objective import PLAIN
from auto_round.tuning.steps import batch_rows, rows_seen
from pipeline.runs import SHORT, quantize, token_rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "compiled"), [({}, 2), ({"layer_config": {"layers.1": {"bits": 8}}}, 3)], ids=["one", "two"]
)
def test_once_for_each_kind_of_block(tiny, tmp_path, monkeypatch, given, compiled):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(running, "compiled_objective", partial(running.compiled_objective, backend))
    model = tiny("llama", num_hidden_layers=3)
    more = {"nsamples": 8, "batch_size": 8, "iters": 10, "verify": False, "enable_torch_compile": True}
    quantize(model, tmp_path / "out", dataset=token_rows(16), **more, **given)
    assert len(made) == compiled  # the rounding of each width, and the block with its loss


@pytest.mark.parametrize(
    ("batch", "rows", "at_once", "passes"),
    [
        (8, 100, 0, 2),
        (8, 100, 16, 2),
        (8, 100, 1, 1),
        (6, 100, 0, 1),
        (32, 100, 6, 4),
        (8, 3, 0, 1),
        (1, 9, 0, 1),
    ],
)
def test_passes_of_one_number_of_rows(batch, rows, at_once, passes):
    config = TuneConfig(iters=200, batch_size=batch, rows_at_once=at_once)
    changed = running.in_equal_passes(config, rows)
    assert changed == replace(config, rows_at_once=passes)
    assert all(min(batch_rows(config, step), rows) % passes == 0 for step in range(200))


@pytest.fixture
def job(tiny):
    def make(**given):
        options = build_options({**SHORT, "model": str(tiny("llama")), "output_dir": "out", **given})
        return prepare(options, dataset=token_rows())

    return make


def kinds(job):
    return compiling.block_kinds(job.plan, job.source.layers, job.source.blocks)


def test_kinds(job):
    assert kinds(job()) == 1
    assert kinds(job(layer_config={"layers.1": {"bits": 8}})) == 2
    assert kinds(job(layer_config={"layers.1.mlp.up_proj": "BF16"})) == 2


def steps(wanted=None, kinds=1, paid=0.0, rounds_inputs=False):
    """Steps whose compiling is paid back so many times."""
    seconds = paid * compiling.COMPILE_SECONDS / compiling.SAVING
    return compiling.TuningSteps(
        wanted, kinds, rounds_inputs, seconds * compiling.CPU_FLOPS, torch.device("cpu")
    )


def test_not_by_itself_where_it_does_not_pay(monkeypatch):
    monkeypatch.setattr(running, "compiled_objective", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    assert running.objective_for(steps(paid=0.9)) is PLAIN
    assert running.objective_for(steps(wanted=False, paid=5)) is PLAIN


def test_by_itself_where_it_pays_for_all_kinds(monkeypatch):
    monkeypatch.setattr(running, "compiled_objective", lambda: "compiled")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    assert running.objective_for(steps(paid=1.5)) == "compiled"
    assert running.objective_for(steps(kinds=2, paid=1.5)) is PLAIN
    assert running.objective_for(steps(wanted=True)) == "compiled"


def test_operations_of_a_small_run(job):
    planned = job(iters=200, seqlen=16)
    weights = sum(math.prod(layer.shape) for layer in planned.source.layers if layer.block is not None)
    found = compiling.step_operations(planned.source.layers, 16, planned.tune)
    assert found == 6 * weights * 16 * rows_seen(planned.tune)
    assert found / compiling.CPU_FLOPS * compiling.SAVING < compiling.COMPILE_SECONDS


def test_not_where_inputs_are_rounded(monkeypatch, caplog):
    monkeypatch.setattr(main_job.logger, "propagate", True)
    assert running.objective_for(steps(wanted=True, rounds_inputs=True)) is PLAIN
    assert "activations are quantized" in caplog.text


def test_more_kinds_than_pytorch_keeps(monkeypatch, caplog):
    monkeypatch.setattr(main_job.logger, "propagate", True)
    assert running.objective_for(steps(wanted=True, kinds=compiling.MOST_KINDS + 1)) is PLAIN
    assert f"{compiling.MOST_KINDS + 1} kinds" in caplog.text
