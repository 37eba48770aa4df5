"""Cores and memory that a container leaves, from files as the kernel writes them."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from auto_round.log import logger
from auto_round.pipeline.machine import limits, memory, threads
from auto_round.pipeline.machine.limits import allowed_bytes, usable_cores

TWO_CORES = {
    "version 2": ("0::/", {"cpu.max": "200000 100000"}),
    "version 2, an outer group": ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}),
    "version 1": (
        "4:cpu,cpuacct:/x",
        {"cpu/x/cpu.cfs_quota_us": "200000", "cpu/x/cpu.cfs_period_us": "100000"},
    ),
    "version 1, named as on the host": (
        "4:cpu:/docker/0",
        {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
    ),
}

ONE_GIB = {
    "version 2": (
        "0::/a",
        {
            "a/memory.max": str(3 << 29),
            "a/memory.current": str(3 << 28),
            "a/memory.stat": f"inactive_file {1 << 28}",
        },
    ),
    "version 2, an outer group": (
        "0::/a/b",
        {
            "a/b/memory.max": "max",
            "a/b/memory.current": "5",
            "a/memory.max": str(2 << 30),
            "a/memory.current": str(1 << 30),
        },
    ),
    "version 1": (
        "4:memory:/x",
        {"memory/memory.limit_in_bytes": str(2 << 30), "memory/memory.usage_in_bytes": str(1 << 30)},
    ),
}


def made(root: Path, group: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"7:pids:/\n{group}\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize("case", TWO_CORES)
def test_cores_of_a_container(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: set(range(64)))
    assert usable_cores(made(tmp_path, *TWO_CORES[case])) == 2


def test_cores_without_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: {3, 5, 7})
    assert usable_cores(tmp_path) == 3
    assert usable_cores(made(tmp_path, "0::/", {"cpu.max": "max 100000"})) == 3


@pytest.mark.parametrize("case", ONE_GIB)
def test_memory_of_a_container(case: str, tmp_path: Path) -> None:
    assert allowed_bytes(made(tmp_path, *ONE_GIB[case])) == 1 << 30


def test_memory_of_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made(tmp_path, "0::/", {})
    assert allowed_bytes(root) is None
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2 << 30, resource.RLIM_INFINITY))
    (root / "proc/self/statm").write_text(f"{(1 << 30) // resource.getpagesize()} 1 1 1 0 1 0\n")
    assert allowed_bytes(root) == 1 << 30


def test_available_memory_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "allowed_bytes", lambda: 12345)
    assert memory.available_bytes() == 12345


@pytest.fixture
def with_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """As on two cores with so many threads, of which nobody has said how they wait; the log can be read."""
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "says_how_threads_wait", lambda: False)
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)


def test_many_threads_on_few_cores_are_warned_about(
    with_threads: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    with_threads(64)
    threads.warn_of_threads(torch.device("cpu"))
    assert "64 threads" in caplog.text
    assert "OMP_NUM_THREADS=2" in caplog.text


def test_threads_that_wait_for_other_processes_are_warned_about(
    with_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_threads(2)
    monkeypatch.setattr(threads, "slower_together", lambda: threads.FAR_SLOWER)
    threads.warn_of_threads(torch.device("cpu"))
    assert not caplog.text
    monkeypatch.setattr(threads, "slower_together", lambda: 1200.0)
    threads.warn_of_threads(torch.device("cuda"))
    assert not caplog.text
    threads.warn_of_threads(torch.device("cpu"))
    assert "busy" in caplog.text
    assert "1200 times as long with 2 threads" in caplog.text
    assert "OMP_NUM_THREADS=1" in caplog.text


def test_nothing_is_measured_where_it_is_said_how_threads_wait(
    with_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_threads(2)
    monkeypatch.setattr(threads, "says_how_threads_wait", lambda: True)
    monkeypatch.setattr(threads, "slower_together", lambda: pytest.fail("measured"))
    threads.warn_of_threads(torch.device("cpu"))
    assert not caplog.text


def test_measuring_threads_leaves_their_number() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert threads.slower_together(0.01) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells the parent's peak, too")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    size = 1 << 30
    held = bytearray(size)
    code = "from auto_round.pipeline.machine.memory import peak_bytes; print(peak_bytes())"
    peak = int(subprocess.check_output([sys.executable, "-c", code]))
    assert 0 < peak < len(held)
