"""Journal: survives a cut anywhere in its last line, refuses another run with the difference named."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.checkpoint.journal import Journal
from auto_round.errors import CheckpointError, ConfigError

SIGNATURE: dict[str, Any] = {"model": "abc", "scheme": {"bits": 4, "sym": True}, "lr": 0.005, "rows": (1, 2)}
ENTRIES: list[dict[str, Any]] = [{"block": i, "loss": i / 3, "tensors": [f"t{i}"]} for i in range(4)]


def filled(path: Path) -> Path:
    with Journal.open(path, SIGNATURE) as journal:
        assert not journal.resumed
        for entry in ENTRIES:
            journal.append(entry)
    return path


def test_entries_come_back(tmp_path: Path) -> None:
    with Journal.open(filled(tmp_path / "journal"), SIGNATURE) as journal:
        assert journal.resumed
        assert journal.entries == ENTRIES


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_cut_at_any_byte(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = filled(tmp_path_factory.mktemp("cut") / "journal")
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    cut = data.draw(st.integers(0, len(text)))
    torn = data.draw(st.sampled_from([b"", b"\0" * 9, b"0badf00d {}\n"]))
    path.write_bytes(text[:cut] + torn)
    whole = sum(1 for i in range(len(lines)) if len(b"".join(lines[: i + 1])) <= cut) - 1
    with Journal.open(path, SIGNATURE) as journal:
        assert journal.entries == ENTRIES[: max(whole, 0)]
        for entry in ENTRIES[max(whole, 0) :]:
            journal.append(entry)
    assert path.read_bytes() == text


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"loss", b"lass")
    path.write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match="line 3 is damaged"):
        Journal.open(path, SIGNATURE)


def test_another_run_is_refused_key_by_key(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal")
    before = path.read_bytes()
    other = {"model": "abc", "scheme": {"bits": 3, "sym": True}, "lr": 0.005, "rows": [1, 2], "seed": 7}
    with pytest.raises(ConfigError) as caught:
        Journal.open(path, other)
    message = str(caught.value)
    assert "scheme.bits: 4 then, 3 now" in message
    assert "seed: absent then, 7 now" in message
    for same in ("model", "scheme.sym", "lr:", "rows"):
        assert same not in message
    assert path.read_bytes() == before


def test_long_values_are_cut_in_the_message(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal", {"text": "x" * 5000}) as journal:
        journal.append({"unit": "a"})
    with pytest.raises(ConfigError) as caught:
        Journal.open(tmp_path / "journal", {"text": "y" * 5000})
    assert len(str(caught.value)) < 900


def test_other_settings_begin_anew_while_nothing_is_finished(tmp_path: Path) -> None:
    Journal.open(tmp_path / "journal", {"iters": 1}).close()
    with Journal.open(tmp_path / "journal", {"iters": 2}) as journal:
        assert not journal.resumed
        journal.append({"unit": "a"})
    with Journal.open(tmp_path / "journal", {"iters": 2}) as journal:
        assert journal.resumed
        assert journal.entries == [{"unit": "a"}]


def test_disk_full_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "journal")
    before = path.read_bytes()
    real = os.write
    with Journal.open(path, SIGNATURE) as journal:
        with monkeypatch.context() as patch:

            def full(fd: int, data: bytes) -> int:
                if len(data) <= 10:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(fd, data[:-10])

            patch.setattr(os, "write", full)
            with pytest.raises(ConfigError, match="disk full"):
                journal.append({"block": 4})
        assert path.read_bytes() == before
        journal.append({"block": 4})
        assert journal.entries[-1] == {"block": 4}
