"""What a process costs is its own cost, whatever the process that started it holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

STARTS_OTHERS = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
from process_cost import cost_of
held = bytearray(400 << 20)
held[::4096] = b"x" * len(held[::4096])
small = cost_of([sys.executable, "-S", "-c", ""], output=subprocess.DEVNULL)
large = cost_of([sys.executable, "-S", "-c", "x = b'x' * (200 << 20)"], output=subprocess.DEVNULL)
failed = cost_of([sys.executable, "-S", "-c", "raise SystemExit(3)"], output=subprocess.DEVNULL)
print(small.peak_mib, large.peak_mib, small.status, failed.status, small.cpu_s > 0, small.wall_s > 0)
"""


def test_a_peak_is_that_of_the_process_and_not_of_the_one_that_started_it() -> None:
    command = [sys.executable, "-c", STARTS_OTHERS, str(BENCHMARKS)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(told[0]) < 100
    assert 200 <= int(told[1]) < 300
    assert told[2] == "0"
    assert told[3] != "0"
    assert told[4:] == ["True", "True"]
