"""Targets of the next blocks, computed while others are tuned: the same bytes, also where something ends."""

from __future__ import annotations

import threading

import pytest
import torch

from auto_round.config import build_options
from auto_round.errors import NumericsError
from auto_round.log import logger
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.machine import device
from auto_round.pipeline.running import ahead, lower
from pipeline.runs import ROWS, SHORT, quantize, tree

GIVEN = {"verify": False, "amp": False}


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    quantize(model, out, targets_ahead="off", **GIVEN)
    return tree(out)


@pytest.fixture
def seen(monkeypatch):
    """Groups whose targets were computed ahead, in which thread."""
    real, calls = ahead._foresee, []

    def foresee(job, indices, *others):
        calls.append((list(indices), threading.current_thread().name))
        return real(job, indices, *others)

    monkeypatch.setattr(ahead, "_foresee", foresee)
    return calls


def test_the_bytes_are_the_same(model, plain, tmp_path, seen):
    quantize(model, tmp_path / "out", targets_ahead="on", **GIVEN)
    assert [indices for indices, _ in seen] == [[1], [2]]
    assert all(name.startswith("targets-ahead") for _, name in seen)
    assert tree(tmp_path / "out") == plain


def test_where_memory_ends_nothing_more_is_computed_ahead(model, plain, tmp_path, seen, monkeypatch):
    real, failed = lower.tune_group, []

    def tune(job, indices, table, streams, how, turn):
        result = real(job, indices, table, streams, how, turn) if failed else None
        if result is None:
            failed.append(indices)
            turn.then()
            raise MemoryError
        return result

    monkeypatch.setattr(lower, "tune_group", tune)
    quantize(model, tmp_path / "out", targets_ahead="on", **GIVEN)
    assert [indices for indices, _ in seen] == [[1]]
    assert tree(tmp_path / "out") == plain


def test_what_goes_wrong_ahead_is_said(model, tmp_path, monkeypatch):
    def foresee(*_):
        raise NumericsError("model.layers.1.mlp.up_proj: 3 weights are NaN")

    monkeypatch.setattr(ahead, "_foresee", foresee)
    with pytest.raises(NumericsError, match="3 weights are NaN"):
        quantize(model, tmp_path / "out", targets_ahead="on", **GIVEN)


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({}, None),
        ({"targets_ahead": "off"}, None),
        ({"targets_ahead": "on"}, "cpu"),
        ({"targets_ahead": "on", "iters": 0, "disable_opt_rtn": True}, None),
        ({"targets_ahead": "on", "memory": "lowest"}, None),
    ],
)
def test_where_targets_are_computed(model, given, where, monkeypatch, caplog):
    monkeypatch.setattr(logger, "propagate", True)
    options = build_options({**SHORT, "model": str(model), "output_dir": "out", **given})
    job = prepare(options, dataset=ROWS)
    assert (None if job.ahead is None else str(job.ahead)) == where
    said = any(
        "not computed ahead" in message or "targets_ahead has" in message for message in caplog.messages
    )
    assert said == (where is None and given.get("targets_ahead") == "on")


def accelerators(monkeypatch, count, nbytes):
    """Make PyTorch say that there are so many CUDA devices of this size."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr("auto_round.pipeline.deciding.fit.device_total_bytes", lambda _: nbytes)
    assert device.choose_devices("auto").free == tuple(torch.device("cuda", i) for i in range(1, count))


@pytest.mark.parametrize("nbytes", [80 << 30, 13 << 20])
def test_auto_takes_all_accelerators(tiny, monkeypatch, nbytes):
    """The next one computes targets where a block fits the first; else matrices are spread over all."""
    accelerators(monkeypatch, 4, nbytes)
    model = tiny("llama", hidden_size=256, intermediate_size=512)
    options = {**SHORT, "model": str(model), "output_dir": "out", "device_map": "auto"}
    job = prepare(build_options(options), dataset=ROWS)
    assert str(job.device) == "cuda:0"
    if nbytes > 1 << 30:
        assert (str(job.ahead), dict(job.placement.elsewhere)) == ("cuda:1", {})
        assert "cuda:1" in str(job.memory_plan.table)
    else:
        assert job.ahead is None
        assert set(map(str, job.placement.devices)) == {f"cuda:{i}" for i in range(4)}


def test_all_blocks_together_leave_the_other_accelerators_out(tiny, monkeypatch):
    """They learn on one device; blocks that do not fit it were spread, and the run refused for it."""
    accelerators(monkeypatch, 4, 13 << 20)
    model = tiny("llama", hidden_size=256, intermediate_size=512)
    given = {"output_dir": "out", "device_map": "auto", "distill_steps": 2, "distill_nsamples": 4}
    job = prepare(build_options({**SHORT, "model": str(model), **given}), dataset=ROWS)
    assert not job.placement.several
