"""Reading: equal to the reference implementation, and every defect of a folder is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from auto_round.checkpoint import disk, reader
from auto_round.checkpoint.open_files import MOST_OPEN
from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError, ConfigError, InternalError
from checkpoint.samples import raw, write_sharded


@pytest.fixture
def single(tmp_path: Path, zoo: dict[str, Tensor]) -> Path:
    save_file(zoo, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path, zoo: dict[str, Tensor]) -> Path:
    names = list(zoo)
    shards = {f"model-{i + 1:05d}-of-00003.safetensors": {n: zoo[n] for n in names[i::3]} for i in range(3)}
    write_sharded(tmp_path, shards)
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_are_those_written(
    layout: str, request: pytest.FixtureRequest, zoo: dict[str, Tensor]
) -> None:
    with Checkpoint.open(request.getfixturevalue(layout)) as checkpoint:
        assert set(checkpoint.names) == set(zoo)
        assert checkpoint.nbytes == sum(t.nbytes for t in zoo.values())
        assert len(checkpoint.files) == (1 if layout == "single" else 3)
        for name, tensor in zoo.items():
            got = checkpoint.read(name)
            assert (got.dtype, got.shape, raw(got)) == (tensor.dtype, tensor.shape, raw(tensor))
            assert checkpoint.info(name).nbytes == tensor.nbytes


def test_names_follow_the_bytes(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        places = [(checkpoint.info(n).file, checkpoint.info(n).begin) for n in checkpoint.names]
    assert places == sorted(places)


def test_another_dtype_piece_by_piece(
    single: Path, zoo: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for piece in (16 << 20, 40):
        monkeypatch.setattr(reader, "_PIECE_BYTES", piece)
        with Checkpoint.open(single) as checkpoint:
            for name, tensor in zoo.items():
                for dtype in (torch.float64, tensor.dtype):
                    got = checkpoint.read_as(name, dtype)
                    assert got.dtype == dtype
                    assert got.is_contiguous()
                    assert raw(got) == raw(tensor.to(dtype))


def test_rows(single: Path, zoo: dict[str, Tensor]) -> None:
    with Checkpoint.open(single) as checkpoint:
        for start, stop in [(0, 4), (1, 3), (2, 2), (3, 4)]:
            assert raw(checkpoint.read_rows("cube", start, stop)) == raw(zoo["cube"][start:stop])
        for start, stop in [(-1, 2), (2, 5), (3, 2)]:
            with pytest.raises(InternalError, match="cube"):
                checkpoint.read_rows("cube", start, stop)
        with pytest.raises(InternalError, match="scalar"):
            checkpoint.read_rows("scalar", 0, 1)


def test_result_is_aligned_and_owned(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        first = checkpoint.read("odd")
        before = raw(first)
        first.zero_()
        assert raw(checkpoint.read("odd")) == before
        assert checkpoint.read("t.F64").data_ptr() % 16 == 0


def test_threads_get_their_own_tensors(sharded: Path, zoo: dict[str, Tensor]) -> None:
    wrong: list[str] = []

    def read_all(names: list[str]) -> None:
        wrong.extend(n for n in names if raw(checkpoint.read(n)) != raw(zoo[n]))

    with Checkpoint.open(sharded) as checkpoint:
        threads = [threading.Thread(target=read_all, args=(list(zoo)[i:] * 20,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("kernel", [True, False])
def test_copy_into_a_file(
    single: Path, zoo: dict[str, Tensor], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(disk, "_kernel_copy", lambda *_: 0)
        monkeypatch.setattr(disk, "CHUNK_BYTES", 7)
    target = single / "target"
    with Checkpoint.open(single) as checkpoint, target.open("wb") as file:
        checkpoint.copy_into("cube", file.fileno(), 5)
    assert target.read_bytes() == b"\0" * 5 + raw(zoo["cube"])


def test_fingerprint_sees_names_shapes_and_bytes(tmp_path: Path) -> None:
    def fingerprint(tensors: dict[str, Tensor]) -> str:
        save_file(tensors, tmp_path / "model.safetensors")
        with Checkpoint.open(tmp_path) as checkpoint:
            return checkpoint.fingerprint()

    big = torch.zeros(20_000, dtype=torch.float32)
    changed = [big.clone() for _ in range(3)]
    for tensor, at in zip(changed, (0, 10_000, -1), strict=True):
        tensor[at] = 1
    variants = [{"a": big}, {"b": big}, {"a": big.reshape(2, -1)}, *({"a": c} for c in changed)]
    prints = [fingerprint(v) for v in variants]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"a": big}) == prints[0]


def test_unknown_tensor_names_the_nearest(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint, pytest.raises(CheckpointError, match='did you mean "scalar"'):
        checkpoint.read("scalars")


def test_file_cut_after_opening(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        info = checkpoint.info("cube")
        os.truncate(info.file, info.begin + 4)
        message = f'ends at offset {info.begin + 4} inside tensor "cube"'
        for attempt in (lambda: checkpoint.read("cube"), checkpoint.fingerprint):
            with pytest.raises(CheckpointError, match="inside tensor"):
                attempt()
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read("cube")
        with (single / "target").open("wb") as file, pytest.raises(CheckpointError, match=message):
            checkpoint.copy_into("cube", file.fileno(), 0)


def test_closed_checkpoint_says_so(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(InternalError, match="after close"):
        checkpoint.read("cube")


OTHER, SHARD = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def test_missing_shard_names_a_tensor(sharded: Path, zoo: dict[str, Tensor]) -> None:
    (sharded / SHARD).unlink()
    with pytest.raises(
        CheckpointError, match=f'{SHARD} is missing: it holds tensor "{list(zoo)[1]}" and 6 more'
    ):
        Checkpoint.open(sharded)


def test_dangling_link_is_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).rename(sharded / "blob")
    (sharded / SHARD).symlink_to(sharded / "blob")
    Checkpoint.open(sharded).close()
    (sharded / "blob").unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD} is missing"):
        Checkpoint.open(sharded)


def test_truncated_shard(sharded: Path) -> None:
    size = (sharded / SHARD).stat().st_size
    os.truncate(sharded / SHARD, size - 1)
    with pytest.raises(
        CheckpointError, match=rf"{SHARD}: truncated: tensor .* but the file ends at {size - 1}"
    ):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"cube": "../model.safetensors"}), "must lie in a"),
        (lambda m: m.update({"cube": "model.bin"}), "must lie in a"),
        (lambda m: m.update({"cube": 3}), "must lie in a"),
        (lambda m: m.update({"cube": "/model.safetensors"}), "must lie in a"),
        (lambda m: m.clear(), "weight_map must map"),
    ],
)
def test_index_that_disagrees(sharded: Path, change: object, message: str) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    change(value["weight_map"])  # type: ignore[operator]
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        (lambda m: m.pop("cube"), 'leaves out tensors that its shards hold.*: "cube"$'),
        (lambda m: m.update({"cube": OTHER}), 'another shard than the one that holds: "cube"$'),
        (lambda m: m.update({"ghost": SHARD}), 'names tensors that no shard holds.*: "ghost"$'),
        (lambda m: m.update({n: f"./{file}" for n, file in m.items()}), None),
    ],
)
def test_index_that_is_wrong_without_harm(
    sharded: Path, zoo: dict[str, Tensor], change: object, mistake: str | None
) -> None:
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    change(value["weight_map"])  # type: ignore[operator]
    index.write_text(json.dumps(value))
    with Checkpoint.open(sharded) as checkpoint:
        assert set(checkpoint.names) == set(zoo)
        for name, tensor in zoo.items():
            assert raw(checkpoint.read(name)) == raw(tensor)
        assert len(checkpoint.mistakes) == (0 if mistake is None else 1)
        assert mistake is None or re.search(mistake, checkpoint.mistakes[0])


def test_shards_may_lie_in_a_folder_below(sharded: Path, zoo: dict[str, Tensor]) -> None:
    (sharded / "below").mkdir()
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    for file in set(value["weight_map"].values()):
        (sharded / file).rename(sharded / "below" / file)
    value["weight_map"] = {name: f"below/{file}" for name, file in value["weight_map"].items()}
    index.write_text(json.dumps(value))
    with Checkpoint.open(sharded) as checkpoint:
        assert raw(checkpoint.read("cube")) == raw(zoo["cube"])
        assert checkpoint.mistakes == ()


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    shards = {f"{i:02}.safetensors": {f"t{i}": torch.full((3,), float(i))} for i in range(3 * MOST_OPEN)}
    write_sharded(tmp_path, shards)
    most = 0

    def read_all(checkpoint: Checkpoint) -> None:
        nonlocal most
        for i in range(len(shards)):
            assert checkpoint.read(f"t{i}").tolist() == [i] * 3
            most = max(most, sum(_is_in(tmp_path, link) for link in Path("/proc/self/fd").iterdir()))

    with Checkpoint.open(tmp_path) as checkpoint:
        threads = [threading.Thread(target=read_all, args=(checkpoint,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        checkpoint.fingerprint()
    assert 0 < most <= MOST_OPEN + 4  # those in use come on top: four threads


def _is_in(folder: Path, link: Path) -> bool:
    try:
        return link.readlink().parent == folder
    except OSError:  # closed meanwhile
        return False


def test_file_that_was_replaced_while_it_was_closed(tmp_path: Path) -> None:
    shards = {f"{i:02}.safetensors": {f"t{i}": torch.full((3,), float(i))} for i in range(MOST_OPEN + 2)}
    write_sharded(tmp_path, shards)
    with Checkpoint.open(tmp_path) as checkpoint:
        for name in checkpoint.names:
            checkpoint.read(name)
        shutil.copy(tmp_path / "00.safetensors", tmp_path / "new")
        (tmp_path / "new").replace(tmp_path / "00.safetensors")
        with pytest.raises(CheckpointError, match="another file"):
            checkpoint.read("t0")


def test_tensor_in_two_shards_is_read_where_the_index_says(tmp_path: Path) -> None:
    one, two = torch.ones(2), torch.zeros(2)
    shards = {"a.safetensors": {"x": one, "y": one + 1}, "b.safetensors": {"x": two, "z": two + 1}}
    write_sharded(tmp_path, shards)  # the later shard wins in the index
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.info("x").file.name == "b.safetensors"
        assert checkpoint.read("x").tolist() == [0, 0]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}, "weight_map": {}}']
)
def test_index_that_is_not_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match=f"{name}.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors, which are not"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(single: Path) -> None:
    (single / "model.safetensors").chmod(0)
    with pytest.raises(ConfigError, match="no permission to read"):
        Checkpoint.open(single)
