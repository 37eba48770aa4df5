"""Output folder: appears whole or not at all, and never over something else."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from auto_round.checkpoint.record import OURS, RECORD
from auto_round.checkpoint.workfolder import OutputFolder, refuse_occupied
from auto_round.errors import CheckpointError, ConfigError, InternalError


def test_nothing_under_the_name_until_sealed(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with OutputFolder.open(out) as work:
        assert not work.resumable
        (work.folder / "config.json").write_text("{}")
        (work.scratch / "journal").write_text("x")
        assert not out.exists()
        assert work.seal() == out
    assert [f.name for f in out.iterdir()] == ["config.json"]
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_unfinished_work_is_kept_and_continued(tmp_path: Path) -> None:
    with OutputFolder.open(tmp_path / "out") as work:
        (work.folder / "a").write_text("1")
        (work.scratch / "journal").write_text("x")
    with OutputFolder.open(tmp_path / "out") as work:
        assert work.resumable
        assert (work.folder / "a").read_text() == "1"
        work.discard()
        assert not work.resumable
        assert list(work.folder.iterdir()) == list(work.scratch.iterdir()) == []


def test_empty_folder_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with OutputFolder.open(tmp_path / "out") as work:
        (work.folder / "a").touch()
        work.seal()
    assert (tmp_path / "out" / "a").exists()


def test_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with OutputFolder.open(tmp_path / "out") as work:
        (work.folder / "a").touch()
        assert work.seal() == tmp_path / "disk"
    assert (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize("out", [".", "..", "../inside", ""])
def test_the_working_directory_is_not_replaced(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be gone for the shell that stands in it."""
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(ConfigError, match=r"is or holds the working directory.*choose another"):
        OutputFolder.open(out, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["inside"]


@pytest.mark.parametrize("out", ["runs/one", "runs", "link"])
@pytest.mark.parametrize("source", ["runs/one", "runs/one/model.gguf", "link"])
def test_what_is_read_is_not_replaced(out: str, source: str, tmp_path: Path) -> None:
    """Also where it is an older output, which others are replaced by."""
    for folder in ("runs", "runs/one"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / RECORD).write_text('{"asked": "a", "files": {}}')
    (tmp_path / "runs" / "one" / "model.gguf").touch()
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "one")
    OutputFolder.open(tmp_path / out).abandon()
    with pytest.raises(ConfigError, match=r"is or holds what is read.*choose another"):
        OutputFolder.open(tmp_path / out, overwrite=True, source=tmp_path / source)
    OutputFolder.open(tmp_path / "runs" / "one" / "further", source=tmp_path / source).abandon()


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"too long; choose another"):
        OutputFolder.open(tmp_path / ("x" * 300))


def test_occupied_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "away")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"already holds 1 files \(\"thesis.tex\".*choose another"):
            OutputFolder.open(tmp_path / "full", overwrite=overwrite)
        with pytest.raises(ConfigError, match="not a folder"):
            OutputFolder.open(tmp_path / "file", overwrite=overwrite)
    with pytest.raises(ConfigError, match="mount point"):
        refuse_occupied(Path("/proc"))
    with pytest.raises(ConfigError, match="cannot write"):
        OutputFolder.open(tmp_path / "file" / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dangling", "file", "full"]


@pytest.mark.parametrize("mark", ["quantization_config.json", "report.json"])
def test_only_our_own_output_is_replaced(tmp_path: Path, mark: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / mark).write_text(json.dumps({OURS: "1.0"}))
    (out / "old").touch()
    with pytest.raises(ConfigError, match="--overwrite"):
        OutputFolder.open(out)
    with OutputFolder.open(out, overwrite=True) as work:
        (work.folder / "new").touch()
        assert (out / "old").exists()
        work.seal()
    assert [f.name for f in out.iterdir()] == ["new"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bits": 4}', "\xff"])
def test_foreign_config_is_not_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "quantization_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="only a folder written by auto-round"):
        refuse_occupied(tmp_path, overwrite=True)


def test_partial_folder_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r'out\.partial is not an unfinished output \("thesis\.tex"'):
        OutputFolder.open(tmp_path / "out")


def test_second_run_waits_for_nobody(tmp_path: Path) -> None:
    with OutputFolder.open(tmp_path / "out"), pytest.raises(ConfigError, match="another run is writing"):
        OutputFolder.open(tmp_path / "out")
    OutputFolder.open(tmp_path / "out").close()


def test_lock_of_a_killed_run_is_released(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        OutputFolder.open(tmp_path / "out")
        os.write(writer, b"x")
        signal.pause()
        os._exit(0)
    os.read(reader, 1)
    with pytest.raises(ConfigError, match="another run"):
        OutputFolder.open(tmp_path / "out")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    OutputFolder.open(tmp_path / "out").close()


def test_something_appears_there_meanwhile(tmp_path: Path) -> None:
    with OutputFolder.open(tmp_path / "out") as work:
        (work.folder / "a").touch()
        (work.scratch / "journal").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").touch()
        with pytest.raises(ConfigError, match="thesis"):
            work.seal()
        assert (work.folder / "a").exists()
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_leftover_of_a_crash_after_the_rename_is_swept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    (tmp_path / "out.partial" / "scratch").mkdir(parents=True)
    (tmp_path / "out.partial" / "scratch" / "activations").touch()
    with pytest.raises(ConfigError, match="already holds"):
        OutputFolder.open(tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_use_after_seal(tmp_path: Path) -> None:
    work = OutputFolder.open(tmp_path / "out")
    work.seal()
    with pytest.raises(InternalError, match="sealed or closed"):
        work.seal()


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, ConfigError, "disk full"),
        (errno.EDQUOT, ConfigError, "disk full"),
        (errno.EROFS, ConfigError, "no permission"),
        (errno.EACCES, ConfigError, "no permission"),
        (errno.EIO, CheckpointError, "cannot write"),
    ],
)
def test_failures_of_the_disk(
    tmp_path: Path, code: int, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with OutputFolder.open(tmp_path / "out") as work:
        (work.scratch / "journal").touch()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(error, match=message):
                work.seal()
        assert not (tmp_path / "out").exists()
    with OutputFolder.open(tmp_path / "out") as work:
        assert work.resumable
        work.seal()
    assert (tmp_path / "out").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="no permission to write"):
            OutputFolder.open(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def finish(out: Path, asked: str, *names: str, overwrite: bool = False) -> None:
    with OutputFolder.open(out, overwrite=overwrite) as work:
        work.discard()
        for name in names:
            (work.folder / name).parent.mkdir(exist_ok=True)
            (work.folder / name).write_text(asked)
        work.seal(asked)


def files(folder: Path) -> dict[str, str]:
    inside = (f for f in folder.rglob("*") if f.is_file() and f.name != RECORD)
    return {f.relative_to(folder).as_posix(): f.read_text() for f in sorted(inside)}


def test_the_same_request_finds_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out, "a", "model.safetensors", "config.json")
    with OutputFolder.open(out) as work:
        assert work.holds("a")
        assert not work.holds("b")
        work.abandon()
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    with OutputFolder.open(out, overwrite=True) as work:
        assert not work.holds("a")
        work.abandon()
    (out / "config.json").write_text("edited by its owner")
    with OutputFolder.open(out) as work:
        assert work.holds("a")
        (out / "model.safetensors").write_text("cut short")
        assert not work.holds("a")
        (out / "model.safetensors").unlink()
        assert not work.holds("a")


def test_a_run_killed_while_it_wrote_the_record_is_found_finished_once_continued(tmp_path: Path) -> None:
    """What it left under the record's temporary name becomes the record: it is no file of the output."""
    out = tmp_path / "out"
    finish(out, "a", "config.json", f".{RECORD}.tmp")
    assert list(json.loads((out / RECORD).read_text())["files"]) == ["config.json"]
    with OutputFolder.open(out) as work:
        assert work.holds("a")
        work.abandon()


def test_another_request_replaces_our_files_and_no_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out, "a", "config.json", "gptq/model.safetensors", "awq/model.safetensors", "old.json")
    (out / "thesis.tex").write_text("mine")
    (out / "gptq" / "notes.txt").write_text("mine")
    finish(out / "beside", "c", "config.json")
    with OutputFolder.open(out) as work:
        (work.folder / "config.json").write_text("b")
        assert files(out)["config.json"] == "a"
        work.seal("b")
    assert files(out) == {
        "config.json": "b",
        "thesis.tex": "mine",
        "gptq/notes.txt": "mine",
        "beside/config.json": "c",
    }
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_outputs_takes_one_more(tmp_path: Path) -> None:
    out = tmp_path / "tmp_autoround"
    finish(out / "Qwen3-w4g128", "a", "config.json")
    finish(out, "b", "config.json")
    assert files(out) == {"Qwen3-w4g128/config.json": "a", "config.json": "b"}
    finish(out / "Qwen3-w4g128", "c", "config.json")
    finish(out, "d", "config.json")
    assert files(out) == {"Qwen3-w4g128/config.json": "c", "config.json": "d"}
    (tmp_path / "papers").mkdir()
    finish(tmp_path / "papers" / "model", "a", "config.json")
    (tmp_path / "papers" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r'"thesis\.tex".*choose another'):
        OutputFolder.open(tmp_path / "papers", overwrite=True)


def test_a_file_of_the_same_name_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out, "a", "config.json")
    (out / "README.md").write_text("mine")
    with OutputFolder.open(out) as work:
        (work.folder / "README.md").write_text("b")
        (work.scratch / "journal").touch()
        with pytest.raises(ConfigError, match=r"README\.md was not written by auto-round"):
            work.seal("b")
    assert files(out) == {"config.json": "a", "README.md": "mine"}
    (out / "README.md").rename(tmp_path / "README.md")
    with OutputFolder.open(out) as work:
        assert work.resumable
        work.seal("b")
    assert files(out) == {"README.md": "b"}


def test_an_unfinished_output_inside_is_not_moved(tmp_path: Path) -> None:
    with OutputFolder.open(tmp_path / "out" / "inner") as inner:
        (inner.scratch / "journal").touch()
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=r"inner\.partial is an unfinished output inside"):
                OutputFolder.open(tmp_path / "out", overwrite=overwrite)
        inner.seal("a")
    finish(tmp_path / "out", "b", "config.json")


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_crash_while_an_output_is_replaced_loses_nothing(tmp_path: Path, done: int) -> None:
    """The old one is set aside, the new one takes its place, what is not ours moves over: cut after each."""
    out = tmp_path / "out"
    finish(out, "a", "config.json")
    for name in ("first.txt", "second.txt"):
        (out / name).write_text("mine")
    replaced = tmp_path / "out.partial" / "replaced"
    replaced.parent.mkdir()
    out.rename(replaced)
    if done:
        finish(tmp_path / "new", "b", "config.json")
        (tmp_path / "new").rename(out)
    if done == 2:
        (replaced / "first.txt").rename(out / "first.txt")
    OutputFolder.open(out).abandon()
    owner = "b" if done else "a"
    assert files(out) == {"config.json": owner, "first.txt": "mine", "second.txt": "mine"}
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
