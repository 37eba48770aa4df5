from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from auto_round.calibration import hub
from auto_round.calibration.hub import is_cached, is_reachable, read_hub
from auto_round.calibration.registry import HUB_DATASETS, HubDataset, find_dataset, known_names
from auto_round.errors import ConfigError

datasets = pytest.importorskip("datasets")  # a machine of which only kernels are asked may lack it


class Loader:
    """Stands in for `datasets.load_dataset`: two records a split, and a memory of the calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, path: str, **options: Any) -> Any:
        self.calls.append({"path": path, **options})
        records = [{"text": f"{options['split']} {i}"} for i in range(2)]
        return iter(records) if options["streaming"] else records


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    made = Loader()
    monkeypatch.setattr(datasets, "load_dataset", made)
    monkeypatch.setattr(hub, "is_reachable", lambda url: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return made


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_registered_names_are_unique() -> None:
    names = [name.casefold() for name in known_names()]
    assert len(names) == len(set(names))


def test_every_row_is_found_in_any_case() -> None:
    for row in HUB_DATASETS:
        assert all(find_dataset(name.upper()) is row for name in row.names)


def test_splits_come_one_after_the_other(loader: Loader) -> None:
    row = find_dataset("mbpp")
    assert row is not None
    assert [dict(r)["text"] for r in read_hub(row, (), "hf")] == [
        f"{split} {i}" for split in ("train", "validation", "test") for i in range(2)
    ]
    assert [dict(r)["text"] for r in read_hub(row, ("test",), "hf")] == ["test 0", "test 1"]


def test_a_downloaded_data_set_is_read_in_any_order(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = datasets.Dataset.from_list([{"text": f"{i}"} for i in range(5)])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: whole)
    records = read_hub(HUB_DATASETS[0], (), "hf")
    assert isinstance(records, Sequence)
    assert [records[3], records[-1], len(records)] == [{"text": "3"}, {"text": "4"}, 5]


def test_a_stream_that_breaks_off_is_a_config_error(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[object]:
        yield {"text": "a"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: broken())
    records = iter(read_hub(HubDataset(("a/b",), streamed=True), (), "hf"))
    assert next(records) == {"text": "a"}
    with pytest.raises(ConfigError, match=r"a/b broke off.*gone.*python-docs"):
        next(records)


def test_code_from_the_hub_is_never_trusted(loader: Loader) -> None:
    for row in HUB_DATASETS:
        if row.platform == "hf":
            list(read_hub(row, (), "hf"))
    assert loader.calls
    assert not any(call.get("trust_remote_code") for call in loader.calls)


def test_a_data_set_with_a_script_is_read_from_its_files(loader: Loader) -> None:
    row = find_dataset("codeparrot/github-code-clean")
    assert row is not None
    list(read_hub(row, (), "hf"))
    assert loader.calls[0]["path"] == "parquet"
    assert loader.calls[0]["data_files"] == "hf://datasets/codeparrot/github-code-clean/data/*.parquet"


@pytest.mark.parametrize("streamed", [False, True])
def test_limit(loader: Loader, streamed: bool) -> None:
    records = read_hub(HubDataset(("a/b",), ("x", "y"), limit=3, streamed=streamed), (), "hf")
    assert [dict(r)["text"] for r in records] == ["x 0", "x 1", "y 0"]


def test_a_hub_out_of_reach_fails_fast_and_names_the_ways_out(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed_port: int
) -> None:
    monkeypatch.setattr(hub, "is_reachable", is_reachable)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read_hub(HUB_DATASETS[0], (), "hf")
    assert time.monotonic() - began < 5
    assert not loader.calls
    for word in ("python-docs", "--dataset path.jsonl", "HF_HOME", "HF_DATASETS_OFFLINE"):
        assert word in str(caught.value)


def test_a_cached_copy_serves_when_the_hub_is_out_of_reach(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda url: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "NeelNanda___pile-10k").mkdir()
    assert len(list(read_hub(HUB_DATASETS[0], (), "hf"))) == 2
    assert "cached copy" in caplog.text


def test_failures_of_the_client_are_config_errors(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, **options: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match=r"a/b, split train: RuntimeError: Dataset scripts .*python-docs"):
        read_hub(HubDataset(("a/b",)), (), "hf")


def test_modelscope_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
    for row, platform in ((find_dataset("swift/pile-val-backup"), "hf"), (HUB_DATASETS[0], "model_scope")):
        assert row is not None
        with pytest.raises(ConfigError, match=r"auto-round\[modelscope\]"):
            read_hub(row, (), platform)  # type: ignore[arg-type]


def test_reachability_asks_only_web_addresses(closed_port: int) -> None:
    assert not is_reachable("file:///etc/hostname")
    assert not is_reachable(f"http://127.0.0.1:{closed_port}/x", seconds=1)


def test_cache_folders_are_found_under_their_spelling(tmp_path: Path) -> None:
    (tmp_path / "HuggingFaceH4___ultrachat_200k").mkdir()
    assert is_cached("HuggingFaceH4/ultrachat_200k", tmp_path)
    assert not is_cached("HuggingFaceH4/ultrachat", tmp_path)
    assert not is_cached("a/b", tmp_path / "none")
