from __future__ import annotations

import json
from pathlib import Path

import pytest

from auto_round.calibration import local
from auto_round.calibration.local import Lazy, chain, read_path
from auto_round.errors import ConfigError
from auto_round.log import logger


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_json_lines_are_read_in_any_order_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "é1"}\n\n  \n"two"\r\n[3, 4]')
    records = read_path(path, ())
    assert len(records) == 3
    assert [records[2], records[0], records[-2]] == [[3, 4], {"text": "é1"}, "two"]
    assert records[1:] == ["two", [3, 4]]


@pytest.mark.parametrize(
    ("data", "splits", "wanted"),
    [
        (["a", {"text": "b"}], (), ["a", {"text": "b"}]),
        ({"text": ["a", "b"]}, (), ["a", "b"]),
        ({"id": [1], "text": ["a"]}, (), ["a"]),
        ({"train": ["a"], "test": [{"text": "b"}]}, (), ["a", {"text": "b"}]),
        ({"train": ["a"], "test": ["b"]}, ("test",), ["b"]),
        ({"train": ["a"], "test": ["b"]}, ("test", "train"), ["b", "a"]),
        ({"input_ids": [1, 2]}, (), [{"input_ids": [1, 2]}]),
    ],
)
def test_json_may_be_a_list_or_a_mapping_of_lists(
    tmp_path: Path, data: object, splits: tuple[str, ...], wanted: list[object]
) -> None:
    assert list(read_path(write(tmp_path / "a.json", json.dumps(data)), splits)) == wanted


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    assert list(read_path(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n'), ())) == [
        {"text": "a"},
        {"text": "b"},
    ]


def test_text_is_cut_at_line_ends_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "TEXT_PIECE", 50)
    text = "".join(f"line {i} é\n" for i in range(100)) + "no end"
    pieces = [str(piece) for piece in read_path(write(tmp_path / "a.txt", text), ())]
    assert len(pieces) > 10
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert max(len(piece.encode()) for piece in pieces) < 70


def test_parquet_keeps_only_the_columns_that_matter(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": [1, 2], "text": ["a", None]})
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_path(tmp_path / "a.parquet", ())) == [{"text": "a"}, {"text": None}]


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", '"b"\n')
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "a.json", '["c", "d"]')
    write(tmp_path / "a.txt", "a\n")
    write(tmp_path / "skipped.md", "no\n")
    assert list(read_path(tmp_path, ())) == ["a\n", "b", "c", "d"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "no such file"),
        ("a.csv", "x", "cannot read .csv"),
        ("a", "x", "without a suffix"),
        ("a.json", "{", "line 1, column 2"),
        ("a.json", "3", "holds a int"),
        ("a.json", b"\xff[]", "not UTF-8"),
        ("a.parquet", b"PAR1", "Parquet"),
        ("a.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_unreadable_files_are_config_errors(
    tmp_path: Path, name: str, content: str | bytes | None, words: str
) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=words):
        read_path(tmp_path / name, ())


@pytest.mark.parametrize(("line", "words"), [(b"{]", "line 2: not JSON"), (b'"\xff"', "line 2: not UTF-8")])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    records = read_path(write(tmp_path / "a.jsonl", b'"fine"\n' + line + b"\n"), ())
    assert records[0] == "fine"
    with pytest.raises(ConfigError, match=words):
        records[1]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '"a"'), ("a.json", '["a"]'), ("a.json", '"a"\n"a"')])
@pytest.mark.parametrize(("split", "said"), [("train", False), ("validation", True)])
def test_a_file_without_splits_is_one(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str,
    split: str,
    said: bool,
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    assert read_path(write(tmp_path / name, text), (split,))[0] == "a"
    assert ("split=validation has no effect" in caplog.text) is said


def test_a_split_that_a_file_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no split \['dev'\]; the file has \['train'\]"):
        read_path(write(tmp_path / "a.json", '{"train": []}'), ("dev",))


def test_an_empty_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file in this folder"):
        read_path(tmp_path, ())


def test_chain_equals_concatenation() -> None:
    parts = [Lazy(count, lambda i, count=count: (count, i)) for count in (3, 0, 2)]
    assert list(chain(parts)) == [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)]
    with pytest.raises(IndexError):
        chain(parts)[5]
