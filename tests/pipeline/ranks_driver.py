"""Runs by several processes that talk through gloo, as torchrun starts them; one of them may be killed.

    python ranks_driver.py CASES.json

A case has `ranks` (1: a process alone), `options`, `rows`, and if wanted `of_rank` (rank -> options of it
alone) and `kill` (rank and seconds). Children are forked, so that packages are imported once. Nobody stops
the others when one has ended, as torchrun would: they have to notice. Prints how each case ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from auto_round.config import build_options
from auto_round.errors import AutoRoundError
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.quantize import run

PATIENCE = 120.0
"""Seconds after which a process counts as one that hangs."""


def main(path: str) -> None:
    torch.set_num_threads(1)  # a fork of a process with a thread pool would hang
    cases = json.loads(Path(path).read_text())
    prepare(build_options(cases[0]["options"]), dataset=cases[0]["rows"])  # imports what all would import
    sys.stdout.write(json.dumps([run_case(case, Path(path).parent) for case in cases]) + "\n")


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """How the processes of a case ended: exit status, what each said, seconds until the last one ended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    began = time.perf_counter()
    children = [_fork(case, rank, port, folder) for rank in range(case["ranks"])]
    victim, after = case.get("kill") or (None, 0.0)
    if victim is not None:
        time.sleep(after)
        os.kill(children[victim], signal.SIGKILL)
    left, ends = dict(enumerate(children)), {}
    while left and time.perf_counter() - began < PATIENCE + after:
        for rank, child in list(left.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                ends[rank] = os.waitstatus_to_exitcode(status)
                del left[rank]
        time.sleep(0.01)
    for rank, child in left.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ends[rank] = "hung"
    said = [(folder / f"said-{rank}").read_text() for rank in range(case["ranks"])]
    return {
        "ends": [ends[rank] for rank in range(case["ranks"])],
        "said": said,
        "seconds": time.perf_counter() - began,
    }


def _fork(case: dict[str, Any], rank: int, port: str, folder: Path) -> int:
    note = folder / f"said-{rank}"
    note.write_text("")
    child = os.fork()
    if child:
        return child
    if case["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case["ranks"]), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given = {**case["options"], **case.get("of_rank", {}).get(str(rank), {})}
    status = 1
    try:
        run(build_options(given), dataset=case["rows"])
        status = 0
    except AutoRoundError as error:
        note.write_text(f"{type(error).__name__}: {error}")
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    os.fsync = lambda _: None  # a kill loses no page cache
    main(*sys.argv[1:])
