"""Memory that ends while a block is tuned: it is tried again with less, and gives the same."""

from __future__ import annotations

import pytest
import torch

from auto_round.log import logger
from auto_round.pipeline.running import lower
from pipeline.runs import quantize, token_rows, tree

ROWS = token_rows(6, 1024)
LONG = {
    "dataset": ROWS,
    "seqlen": 1024,
    "nsamples": 2,
    "iters": 2,
    "batch_size": 2,
    "amp": False,
    "verify": False,
}
"""Rows so long that each goes through a block alone: then no level changes the order of a sum."""


@pytest.fixture(scope="module")
def model(tiny):
    """A model with room for such rows."""
    return tiny("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """What a run gives whose memory does not end."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out, **LONG)
    return tree(out)


def ends(monkeypatch, error, times, when=lambda indices: True):
    """Let memory end as often where blocks are tuned."""
    real, calls = lower.tune_group, []

    def tune(job, indices, *others):
        if when(indices) and len(calls) < times:
            calls.append(job.tune.rows_at_once)
            raise error
        return real(job, indices, *others)

    monkeypatch.setattr(lower, "tune_group", tune)


@pytest.mark.parametrize("memory", ["low", "lowest"])
def test_less_memory_gives_the_same(model, whole, tmp_path, memory):
    quantize(model, tmp_path / "out", memory=memory, **LONG)
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 2),
        (MemoryError(), 1),
    ],
)
def test_a_block_is_tried_again(model, whole, tmp_path, monkeypatch, caplog, error, times):
    monkeypatch.setattr(logger, "propagate", True)
    ends(monkeypatch, error, times, when=lambda indices: indices == [1])
    quantize(model, tmp_path / "out", **LONG)
    said = [message for message in caplog.messages if "memory ended while model.layers.1" in message]
    assert len(said) == times
    assert "weights rounded twice" in said[0]
    assert ("in files" in said[-1]) == (times == 2)
    assert tree(tmp_path / "out") == whole


def test_the_last_level_is_the_end(model, tmp_path, monkeypatch):
    ends(monkeypatch, MemoryError("all of it"), 9)
    with pytest.raises(MemoryError, match="all of it"):
        quantize(model, tmp_path / "out", **LONG)


def test_other_errors_pass(model, tmp_path, monkeypatch):
    ends(monkeypatch, ValueError("a bug"), 1)
    with pytest.raises(ValueError, match="a bug"):
        quantize(model, tmp_path / "out", **LONG)


def test_a_stream_that_has_begun_to_move_is_not_used_again(model, whole, tmp_path, monkeypatch):
    real = lower.tune_group

    def tune(job, indices, table, streams, *others):
        if indices == [1]:
            streams.between = False
            raise MemoryError
        return real(job, indices, table, streams, *others)

    monkeypatch.setattr(lower, "tune_group", tune)
    with pytest.raises(MemoryError):
        quantize(model, tmp_path / "out", **LONG)
    monkeypatch.setattr(lower, "tune_group", real)
    quantize(model, tmp_path / "out", **LONG)
    assert tree(tmp_path / "out") == whole
