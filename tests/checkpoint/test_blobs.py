"""Saved activations: come back bit for bit, and a failed save leaves the older file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.checkpoint.disk import atomic_write_bytes, atomic_write_json
from auto_round.errors import CheckpointError, ConfigError
from checkpoint.samples import raw


def test_round_trip(tmp_path: Path, zoo: dict[str, Tensor]) -> None:
    save_tensors(tmp_path / "x", {**zoo, "view": zoo["cube"].permute(2, 0, 1)})
    got = load_tensors(tmp_path / "x")
    assert set(got) == {*zoo, "view"}
    assert all(raw(got[name]) == raw(tensor) for name, tensor in zoo.items())
    assert raw(got["view"]) == raw(zoo["cube"].permute(2, 0, 1))
    assert {n: raw(t) for n, t in load_file(tmp_path / "x").items()} == {n: raw(t) for n, t in got.items()}
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_truncated_or_missing(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": torch.ones(9)})
    os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 1)
    with pytest.raises(CheckpointError, match='truncated: tensor "a"'):
        load_tensors(tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_tensors(tmp_path / "y")


def test_failed_save_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tensors(tmp_path / "x", {"a": torch.ones(9)})
    atomic_write_json(tmp_path / "j", {"old": 1})

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ConfigError, match=r"disk full while writing .*x"):
            save_tensors(tmp_path / "x", {"a": torch.zeros(9)})
        with pytest.raises(ConfigError, match="disk full"):
            atomic_write_json(tmp_path / "j", {"new": 1})
    assert load_tensors(tmp_path / "x")["a"].tolist() == [1] * 9
    assert sorted(f.name for f in tmp_path.iterdir()) == ["j", "x"]


def test_atomic_files(tmp_path: Path) -> None:
    os.umask(mask := os.umask(0))
    atomic_write_bytes(tmp_path / "b", b"123")
    atomic_write_json(tmp_path / "j", {"b": "ü", "a": [1]})
    assert (tmp_path / "b").read_bytes() == b"123"
    assert (tmp_path / "j").read_text("utf-8") == '{\n  "b": "ü",\n  "a": [\n    1\n  ]\n}\n'
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o666 & ~mask
