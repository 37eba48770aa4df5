"""What a whole process costs: seconds and peak memory, for the benchmarks that start others."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LAUNCHER = """
import json, os, subprocess, sys, time
begin = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - begin
with open(sys.argv[1], "w") as file:
    json.dump([status, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss], file)
"""
"""A small process that starts the other: what the system tells of a process that has ended (`ru_maxrss`) is
at least what the one that started it held then, and a benchmark may hold a model and its logits."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a process and of those that it waited for.

    Attributes:
        status: exit status as `os.wait4` gives it; 0 for success.
        wall_s: wall seconds.
        cpu_s: user and system seconds.
        peak_mib: largest resident memory of one of them, MiB.
    """

    status: int
    wall_s: float
    cpu_s: float
    peak_mib: int


def cost_of(
    command: list[str], *, output: int | IO[str], environment: Mapping[str, str] | None = None
) -> Cost:
    """Run a command.

    Args:
        command: program and arguments.
        output: where what it prints goes, errors too; `subprocess.DEVNULL` for nowhere.
        environment: None for this process's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "cost.json"
        launch = [sys.executable, "-S", "-c", LAUNCHER, str(told), *command]
        subprocess.run(launch, stdout=output, stderr=output, env=environment, check=True)
        status, wall, cpu, peak_kib = json.loads(told.read_text())
    return Cost(status, wall, cpu, peak_kib // 1024)
