"""What a container or the shell allows this process: processor cores and memory.

Source: the Linux kernel's Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and
scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that this process may use at a time: of the machine, of its affinity, of its container.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for folder in _groups(root, "cpu"):
        quota = _numbers(folder, "cpu.max") or tuple(
            number for name in ("quota", "period") for number in _numbers(folder, f"cpu.cfs_{name}_us")
        )
        if len(quota) == 2 and min(quota) > 0:
            cores = min(cores, math.ceil(quota[0] / quota[1]))
    return max(1, cores)


def allowed_bytes(root: Path = _ROOT) -> int | None:
    """Memory that the container and the shell leave to this process, bytes; None where they set no limit.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    left = [room for folder in _groups(root, "memory") if (room := _room(folder)) is not None]
    left += _address_space(root)
    return max(0, min(left)) if left else None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, the innermost first; those that exist."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if names else "")
        inside = top / path.lstrip("/")  # inside of a container this may be the path on the host
        yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(top))


def _numbers(folder: Path, file: str) -> tuple[int, ...]:
    """Whole numbers in a file of a control group; empty where there is none, or where it says `max`."""
    try:
        return tuple(int(word) for word in (folder / file).read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return ()


def _room(folder: Path) -> int | None:
    """Bytes that a control group has left; what the page cache holds is given back when it is needed."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if (most := _numbers(folder, limit)) and (now := _numbers(folder, used)):
            return most[0] - now[0] + _inactive(folder)
    return None


def _inactive(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.partition(" ")[::2] for line in lines)
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def _address_space(root: Path) -> list[int]:
    """What `ulimit -v` leaves of the address space, bytes; nothing where there is no such limit."""
    if sys.platform != "linux":
        return []
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _numbers(root / "proc/self", "statm")
    if most == resource.RLIM_INFINITY or not pages:
        return []
    return [most - pages[0] * resource.getpagesize()]
