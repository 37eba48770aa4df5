"""Logits on disk: what was put there comes back, within the limit."""

from __future__ import annotations

import os

import pytest
import torch

from auto_round.evaluate.logits_cache import LogitsCache, open_cache
from auto_round.evaluate.subject import Subject

ROW = torch.arange(5)
LOGITS = torch.arange(12.0).view(4, 3)
LIMIT = 420
"""Bytes: three files of numbers and header fit."""


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"abc")
    return Subject("m", folder)


def test_there_and_back(tmp_path):
    cache = LogitsCache(tmp_path / "a", 10**6)
    assert not cache.has(ROW)
    assert cache.get(ROW) is None
    assert cache.put(ROW, LOGITS.bfloat16())
    assert cache.has(ROW)
    assert cache.get(ROW).dtype is torch.bfloat16
    assert torch.equal(cache.get(ROW), LOGITS.bfloat16())
    assert not cache.has(ROW + 1)
    assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]


def test_no_room(tmp_path):
    assert not LogitsCache(tmp_path / "a", 0).put(ROW, LOGITS)
    assert not (tmp_path / "a").exists()


def test_the_limit_holds_and_the_oldest_model_goes_first(tmp_path):
    old, newer, new = (LogitsCache(tmp_path / name, LIMIT) for name in ("old", "newer", "new"))
    for time, cache in ((9, newer), (0, old)):
        assert cache.put(ROW, LOGITS)
        os.utime(cache.folder, (time, time))
    assert new.put(ROW, LOGITS)
    assert new.put(ROW + 1, LOGITS)
    assert not old.folder.exists()
    assert newer.folder.exists()
    assert new.put(ROW + 2, LOGITS)
    assert not newer.folder.exists()
    assert not new.put(ROW + 3, LOGITS)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) <= LIMIT


def test_a_damaged_file_is_as_none(tmp_path):
    cache = LogitsCache(tmp_path / "a", 10**6)
    cache.put(ROW, LOGITS)
    next(cache.folder.iterdir()).write_bytes(b"broken")
    assert cache.get(ROW) is None
    assert not cache.has(ROW)


def test_another_model_dtype_or_file_is_another_folder(tmp_path, model):
    def folder(*how):
        return open_cache(tmp_path / "cache", 10, model, how).folder

    first = folder("float32")
    assert folder("float32") == first
    assert folder("bfloat16") != first
    (model.path / "model.safetensors").write_bytes(b"abcd")
    assert folder("float32") != first
