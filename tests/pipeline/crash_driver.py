"""Kills one quantization run again and again, continues it, and compares the folder with an unkilled run's.

    python crash_driver.py MODEL WORK ROUNDS [OPTION=VALUE ...]

Every round begins anew and is killed once or twice: by the clock at a random moment, or inside a random
call of `os` (half of these inside a write to a shard, which is torn in two). Children are forked, so that
packages are imported once. Prints one JSON object.

Options of its own are `rows`, `stage` (kill behind the first event of this stage only) and `spilled` (states
of tuning all blocks together lie in files).
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from auto_round.config import build_options
from auto_round.log import Progress
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.fitting import states
from auto_round.pipeline.quantize import run
from auto_round.report.record import RUN_RECORD

COUNTED = ("pwrite", "write", "fsync", "ftruncate", "posix_fallocate", "rename", "replace", "unlink", "mkdir")


def main(model: str, work: str, rounds: str, *given: str) -> None:
    settings = {key: _value(text) for key, _, text in (item.partition("=") for item in given)}
    data, stage = settings.pop("rows", None), settings.pop("stage", None)
    if settings.pop("spilled", False):
        states.SPILL_BYTES = 0
    trials = Trials(model, Path(work), settings, data, stage)
    trials.measure()
    for number in range(int(rounds)):
        trials.round(number, random.Random(number))
    figures = {
        "rounds": int(rounds),
        "identical": trials.identical,
        "seconds of a whole run": round(trials.seconds, 2),
        "calls of a whole run": trials.calls,
        "kills": dict(sorted(trials.kills.items())),
        "blocks finished when killed": dict(sorted(trials.progress.items())),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class Trials:
    """One command, run in children that die."""

    def __init__(
        self, model: str, work: Path, settings: dict[str, Any], data: Any, stage: str | None
    ) -> None:
        self.work = work
        self.stage = stage
        self.out = work / "out"
        self.options = build_options({**settings, "model": model, "output_dir": str(self.out)})
        self.data = data
        self.seconds, self.calls, self.shard_writes = 0.0, 0, 0
        self.expected: dict[str, bytes] = {}
        self.identical = 0
        self.kills: Counter[str] = Counter()
        self.progress: Counter[str] = Counter()

    def measure(self) -> None:
        """A whole run: what it gives, how long it takes, how many calls it makes."""
        prepare(self.options, rows=False)  # imports what the children would import one by one
        note, count = self.work / "calls", Count()
        child = self._fork(lambda: _watch(count.look), lambda: note.write_text(json.dumps(count.seen)))
        began = time.perf_counter()
        _wait(child)
        self.seconds = time.perf_counter() - began
        self.calls, self.shard_writes = json.loads(note.read_text())
        self.expected = tree(self.out)
        shutil.rmtree(self.out)

    def round(self, number: int, chance: random.Random) -> None:
        """Kill, perhaps kill again, run to the end, compare."""
        kills, wanted = 0, chance.choice([1, 1, 2])
        while kills < wanted:
            if self.out.exists():  # it was faster than the clock: again, and sooner
                shutil.rmtree(self.out)
                self.seconds *= 0.7
            if number % 2:
                kills += self._kill_by_clock(chance)
            else:
                kills += self._kill_in_call(chance, in_shard=number % 4 == 0)
        if not self.out.exists():  # a kill between the last rename and the exit leaves nothing to do
            _wait(self._fork(_nothing))
        same = tree(self.out) == self.expected
        self.identical += same
        if not same:
            raise SystemExit(f"round {number}: the continued folder differs")
        shutil.rmtree(self.out)
        shutil.rmtree(self.work / "out.partial", ignore_errors=True)

    def _kill_by_clock(self, chance: random.Random) -> bool:
        child = self._fork(_nothing)
        time.sleep(chance.uniform(0.02, 0.9) * self.seconds)
        os.kill(child, signal.SIGKILL)
        return self._note("at a random moment", os.waitpid(child, 0)[1])

    def _kill_in_call(self, chance: random.Random, *, in_shard: bool) -> bool:
        step = chance.randint(1, self.shard_writes if in_shard else self.calls)
        child = self._fork(lambda: _die_at(step, in_shard=in_shard))
        return self._note("inside a shard write" if in_shard else "inside a call", os.waitpid(child, 0)[1])

    def _note(self, kind: str, status: int) -> bool:
        """Count a kill; False when the run had ended before it."""
        if not os.WIFSIGNALED(status):
            return False
        self.kills[kind] += 1
        journal = self.work / "out.partial" / "scratch" / "journal.jsonl"
        lines = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        self.progress[str(max(0, lines - 1))] += 1
        return True

    def _fork(self, begin: Callable[[], None], end: Callable[[], object] = lambda: None) -> int:
        """Run in a child; returns when it is where it may be killed, or dead.

        Args:
            begin: called there, in the child.
            end: called in the child behind the run.
        """
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            self._run([lambda: os.close(write), begin])
            end()
            os._exit(0)
        os.close(write)
        os.read(read, 1)  # nothing comes, but the end
        os.close(read)
        return child

    def _run(self, waiting: list[Callable[[], None]]) -> None:
        def hear(event: Progress) -> None:
            while waiting and event.stage == self.stage:
                waiting.pop(0)()

        while waiting and self.stage is None:
            waiting.pop(0)()
        run(self.options, hear, dataset=self.data)


def _nothing() -> None:
    pass


def _wait(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a run that nobody killed ended with status {status}")


def tree(folder: Path) -> dict[str, bytes]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != RUN_RECORD)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def _is_shard(fd: int) -> bool:
    target = Path(f"/proc/self/fd/{fd}").readlink()
    return target.suffix == ".safetensors" and "output" in target.parts


class Count:
    """How often `os` is called, and how often to write a shard."""

    def __init__(self) -> None:
        self.seen = [0, 0]

    def look(self, name: str, args: tuple[Any, ...]) -> None:
        self.seen[0] += 1
        self.seen[1] += name == "pwrite" and _is_shard(args[0])


def _die_at(step: int, *, in_shard: bool) -> None:
    """Die in the given call from here on; that write is torn in half, any other call does not happen."""
    left = [step]
    real = os.pwrite

    def look(name: str, args: tuple[Any, ...]) -> None:
        write = name == "pwrite" and _is_shard(args[0])
        left[0] -= write or not in_shard
        if left[0] == 0:
            if name == "pwrite":
                fd, data, offset = args
                real(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(look)


def _watch(look: Callable[[str, tuple[Any, ...]], None]) -> None:
    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            look(name, args)
            return real(*args, **named)

        return call

    for name in COUNTED:
        setattr(os, name, watched(name, getattr(os, name)))


if __name__ == "__main__":
    os.fsync = lambda _: None  # a kill loses no page cache
    torch.set_num_threads(1)  # a fork of a process with a thread pool would hang
    main(*sys.argv[1:])
