"""Writing: the reference implementation reads it, and order or interruption leave no trace in the bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from auto_round.checkpoint import disk
from auto_round.checkpoint.open_files import MOST_OPEN
from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.writer import ShardWriter, lay_out
from auto_round.errors import CheckpointError, ConfigError, InternalError
from checkpoint.samples import random_tensor, raw, specs_of


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write(folder: Path, tensors: dict[str, Tensor], order: list[str], limit: int) -> None:
    folder.mkdir(exist_ok=True)
    with ShardWriter.create(folder, specs_of(tensors), max_shard_bytes=limit) as writer:
        for name in order:
            writer.put(name, tensors[name])
        writer.seal()


@pytest.mark.parametrize("limit", [10**9, 100, 1])
def test_reference_reads_our_shards(tmp_path: Path, zoo: dict[str, Tensor], limit: int) -> None:
    write(tmp_path, zoo, list(zoo), limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(files) > 1)
    seen = set()
    for file in files:
        with safe_open(file, "pt") as reference:
            assert reference.metadata() == {"format": "pt"}
            for name in reference.keys():  # noqa: SIM118
                got = reference.get_tensor(name)
                assert (got.dtype, got.shape, raw(got)) == (zoo[name].dtype, zoo[name].shape, raw(zoo[name]))
                seen.add(name)
    assert seen == set(zoo)


def test_shards_fill_in_manifest_order(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((n,), i, dtype=torch.uint8) for i, n in enumerate([40, 40, 40, 200, 10])}
    shards = lay_out(specs_of(tensors), 100)
    assert [sorted(s.begins) for s in shards] == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]
    assert [s.file for s in shards] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    write(tmp_path, tensors, list(tensors), 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 330
    assert index["weight_map"] == {name: s.file for s in shards for name in s.begins}
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.names) == set(tensors)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_order_and_interruption_leave_no_trace(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.mktemp("orders")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dtypes = st.sampled_from([torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float32])
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    kinds = data.draw(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=8))
    tensors = {f"t{i}": random_tensor(dtype, shape, generator) for i, (dtype, shape) in enumerate(kinds)}
    limit = data.draw(st.integers(1, 300))
    write(base / "plain", tensors, list(tensors), limit)

    order = data.draw(st.permutations(list(tensors)))
    cut = data.draw(st.integers(0, len(order)))
    (base / "cut").mkdir()
    with ShardWriter.create(base / "cut", specs_of(tensors), max_shard_bytes=limit) as writer:
        for name in order[:cut]:
            writer.put(name, tensors[name])
    with ShardWriter.reopen(
        base / "cut", specs_of(tensors), max_shard_bytes=limit, written=order[: cut // 2]
    ) as writer:
        assert set(writer.missing) == set(order[cut // 2 :])
        for name in order[cut // 2 :]:
            writer.put(name, tensors[name])
        writer.seal()
    assert contents(base / "cut") == contents(base / "plain")
    shutil.rmtree(base)


def test_copy_equals_put(tmp_path: Path, zoo: dict[str, Tensor]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({f"old.{name}": t for name, t in zoo.items()}, source / "model.safetensors")
    write(tmp_path / "put", zoo, list(zoo), 100)
    (tmp_path / "copied").mkdir()
    with (
        Checkpoint.open(source) as checkpoint,
        ShardWriter.create(tmp_path / "copied", specs_of(zoo), max_shard_bytes=100) as writer,
    ):
        for name in zoo:
            writer.copy(name, checkpoint, f"old.{name}")
        writer.seal()
    assert contents(tmp_path / "copied") == contents(tmp_path / "put")


def test_put_takes_views_and_parameters(tmp_path: Path) -> None:
    w = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    with ShardWriter.create(tmp_path, {"a": (w.dtype, (4, 3)), "b": (w.dtype, (3, 4))}) as writer:
        writer.put("a", w.T)
        writer.put("b", torch.nn.Parameter(w))
        writer.seal()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), w.T)
        assert torch.equal(checkpoint.read("b"), w)


def test_broken_promises(tmp_path: Path, zoo: dict[str, Tensor]) -> None:
    with ShardWriter.create(tmp_path, {"cube": (torch.float16, (4, 3, 2))}) as writer:
        for tensor in (zoo["cube"].float(), zoo["cube"].reshape(12, 2)):
            with pytest.raises(InternalError, match=r"cube.*manifest promises torch\.float16 \[4, 3, 2\]"):
                writer.put("cube", tensor)
        with pytest.raises(InternalError, match="ghost"):
            writer.put("ghost", zoo["cube"])
        with pytest.raises(InternalError, match="ghost"):
            writer.mark_written(["ghost"])
        with pytest.raises(InternalError, match='1 of 1 tensors were never written: "cube"'):
            writer.seal()


def test_damaged_shard_is_remade_only_if_nothing_was_in_it(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(8), "b": torch.zeros(8)}
    write(tmp_path, tensors, ["a", "b"], 32)
    good = contents(tmp_path)
    os.truncate(tmp_path / "model-00002-of-00002.safetensors", 20)
    with pytest.raises(CheckpointError, match=r'00002-of-00002.*held tensor "b"'):
        ShardWriter.reopen(tmp_path, specs_of(tensors), max_shard_bytes=32, written=["a", "b"])
    with ShardWriter.reopen(tmp_path, specs_of(tensors), max_shard_bytes=32, written=["a"]) as writer:
        assert writer.missing == ("b",)
        writer.put("b", tensors["b"])
        writer.seal()
    assert contents(tmp_path) == good


def test_create_removes_shards_of_another_layout(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(8), "b": torch.zeros(8)}
    write(tmp_path, tensors, ["a", "b"], 32)
    write(tmp_path, tensors, ["a", "b"], 10**6)
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


def test_full_disk_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ConfigError, match=r"takes 800 MB, but its disk has 1 MB free"):
        ShardWriter.create(tmp_path, {"a": (torch.float32, (200_000_000,))})


def test_disk_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.ones(8), "b": torch.zeros(8)}
    write(tmp_path / "plain", tensors, ["a", "b"], 10**6)
    (tmp_path / "full").mkdir()
    writer = ShardWriter.create(tmp_path / "full", specs_of(tensors))
    writer.put("a", tensors["a"])
    with monkeypatch.context() as patch:

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "pwrite", full)
        with pytest.raises(ConfigError, match=r"disk full.*again to continue"):
            writer.put("b", tensors["b"])
    assert writer.missing == ("b",)
    with pytest.raises(InternalError, match="never written"):
        writer.seal()
    writer.put("b", tensors["b"])
    writer.seal()
    assert contents(tmp_path / "full") == contents(tmp_path / "plain")


def test_few_shards_are_open_at_a_time(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(3 * MOST_OPEN)}
    with ShardWriter.create(tmp_path, specs_of(tensors), max_shard_bytes=16) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
            links = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
            assert sum(link.parent == tmp_path for link in links) <= MOST_OPEN
        writer.seal()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert all(raw(checkpoint.read(name)) == raw(tensor) for name, tensor in tensors.items())


def test_files_of_systems_that_know_no_offsets(
    tmp_path: Path, zoo: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_AT_OFFSETS", False)
    monkeypatch.setattr(disk, "_kernel_copy", lambda *_: 0)
    monkeypatch.setattr(disk, "CHUNK_BYTES", 7)
    for folder in ("put", "copied"):
        (tmp_path / folder).mkdir()
    with ShardWriter.create(tmp_path / "put", specs_of(zoo)) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(writer.put, zoo, zoo.values()))
        writer.seal()
    with (
        Checkpoint.open(tmp_path / "put") as checkpoint,
        ShardWriter.create(tmp_path / "copied", specs_of(zoo)) as writer,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda name: writer.copy(name, checkpoint), zoo))
        writer.seal()
    put, copied = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("put", "copied"))
    assert put == copied
    monkeypatch.undo()
    with Checkpoint.open(tmp_path / "put") as checkpoint:
        assert all(raw(checkpoint.read(name)) == raw(tensor) for name, tensor in zoo.items())
