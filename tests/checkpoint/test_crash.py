"""Kill -9 at every system call of a whole job; the same job run again gives the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.checkpoint.disk import atomic_write_json
from auto_round.checkpoint.journal import Journal
from auto_round.checkpoint.record import OURS
from auto_round.checkpoint.workfolder import OutputFolder
from auto_round.checkpoint.writer import ShardWriter
from checkpoint.samples import random_tensor, specs_of

COUNTED = (
    "pwrite",
    "write",
    "fsync",
    "ftruncate",
    "posix_fallocate",
    "open",
    "rename",
    "replace",
    "mkdir",
    "unlink",
)
"""Functions of `os` at which the job is killed; `pathlib` and `shutil` call them too."""

TENSORS: dict[str, Tensor] = {
    f"block.{i}.{part}": random_tensor(dtype, (3, 40 + i), torch.Generator().manual_seed(10 * i + j))
    for i in range(3)
    for j, (part, dtype) in enumerate([("qweight", torch.int32), ("scales", torch.float16)])
}


def job(out: Path, *, overwrite: bool = False) -> None:
    """Three blocks, each written, synced, journaled with the state that the next one needs."""
    with (
        OutputFolder.open(out, overwrite=overwrite) as work,
        Journal.open(work.scratch / "journal", {"a": 1}) as log,
    ):
        written = [name for entry in log.entries for name in entry["tensors"]]
        state = torch.zeros(4)
        if log.entries:
            state = load_tensors(work.scratch / f"state-{len(log.entries) - 1}")["state"]
        with ShardWriter.reopen(
            work.folder, specs_of(TENSORS), max_shard_bytes=1400, written=written
        ) as writer:
            for block in range(len(log.entries), 3):
                names = [name for name in TENSORS if name.startswith(f"block.{block}.")]
                for name in names:
                    writer.put(name, TENSORS[name] + int(state[0]))
                state = state + block + 1
                save_tensors(work.scratch / f"state-{block}", {"state": state})
                writer.sync()
                log.append({"tensors": names})
            writer.seal()
        atomic_write_json(work.folder / "report.json", {OURS: "1", "state": state.tolist()})
        work.seal("the same")


def killed_at(step: int, run: Callable[[], None]) -> bool:
    """Run in a child that kills itself inside the given counted call; False when it ended before."""
    child = os.fork()
    if child == 0:
        left = [step]
        for name in COUNTED:
            setattr(os, name, dying(getattr(os, name), left, name))
        run()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def dying(real: Callable[..., Any], left: list[int], name: str) -> Callable[..., Any]:
    """Wrap a function of `os`; writes are torn in half, the rest dies just before."""

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if name in ("pwrite", "write"):
                fd, data, *rest = args
                real(fd, data[: len(data) // 2], *rest)
            os.kill(os.getpid(), signal.SIGKILL)
        return None if name == "fsync" else real(*args, **kwargs)  # a kill loses no page cache: skip the wait

    return call


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_killed_at_every_call_and_continued(tmp_path: Path) -> None:
    job(tmp_path / "whole")
    expected = tree(tmp_path / "whole")
    out = tmp_path / "out"
    step = 1
    while killed_at(step, lambda: job(out)):
        if out.exists():  # killed after the rename: there is nothing left to do
            shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        else:
            killed_at(step // 2 + 1, lambda: job(out))
        if not out.exists():
            job(out)
        assert tree(out) == expected, f"killed at call {step}"
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        step += 1
    assert step > 60
    assert tree(out) == expected


def test_replacing_an_older_output_never_loses_both(tmp_path: Path) -> None:
    out = tmp_path / "out"
    step = 1
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        out.mkdir()
        atomic_write_json(out / "report.json", {OURS: "0"})
        old = tree(out)
        if not killed_at(step, lambda: job(out, overwrite=True)):
            break
        if not out.exists():
            assert tree(tmp_path / "out.partial" / "replaced") == old
        elif tree(out) != old:
            assert (out / "model.safetensors.index.json").exists()
            step += 1
            continue
        job(out, overwrite=True)
        assert tree(out) != old
        assert (out / "model.safetensors.index.json").exists()
        step += 3
    assert step > 60
