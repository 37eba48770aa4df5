"""Memory of this process: how much it has used, and how the C library gives it out."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress

import torch

from auto_round.config.env import keep_products
from auto_round.pipeline.machine.limits import allowed_bytes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_LARGEST_THRESHOLD = 32 << 20
KEPT_PRODUCTS = 128
"""Products for which programs are kept: those of a dense block in three sizes of a batch. To make one again
takes a millisecond."""


def peak_bytes() -> int:
    """Peak resident memory of this process, bytes; 0 where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return 0
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        return int(next(line for line in file if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource  # on Linux it may tell the peak of the process that started this one

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Memory that this process holds now, bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a kernel file, not a path of ours
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return 0


def device_peak_bytes(device: torch.device) -> int:
    """Peak of memory given out on an accelerator, bytes; 0 on the host and where nobody counts."""
    if device.type == "cpu":
        return 0
    ask = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return 0 if ask is None else int(ask(device))


def device_total_bytes(device: torch.device) -> int:
    """Memory of an accelerator in all, bytes; 0 on the host and where nobody tells."""
    if device.type == "cpu":
        return 0
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return 0 if ask is None else int(ask(device)[1])


def available_bytes() -> int:
    """Memory that could be taken without swapping, bytes; 0 where the system does not tell.

    Of the machine, or of what a container or `ulimit -v` leaves, whichever is less.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - a kernel file, not a path of ours
            fields = dict(line.split(":", 1) for line in file)
        machine = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    allowed = allowed_bytes()
    return machine if allowed is None else max(1, min(machine, allowed))


def release_freed_memory() -> None:
    """Give memory that was freed but kept back to the system, between the stages of a run."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def keep_few_products(device: torch.device, dtype: torch.dtype) -> None:
    """Ask oneDNN, which multiplies bfloat16 on CPUs, to keep programs for a few products only.

    It makes a program of half a megabyte for each shape of a product and by default keeps a thousand. Experts
    get other numbers of tokens in each step: they filled 560 MB, and holes beside them as much again
    (docs/LOG.md). It holds for the whole process, from its first such product on, and changes no result.

    Args:
        device: where blocks run.
        dtype: in which they run.
    """
    if device.type == "cpu" and dtype is torch.bfloat16:
        keep_products(KEPT_PRODUCTS)


def keep_freed_memory(*, of_any_size: bool = False) -> bool:
    """Ask glibc to reuse freed tensors instead of returning them to the system; True when it agreed.

    By default every tensor above 128 KiB is mapped and unmapped anew, and the page faults cost as much as
    the arithmetic: attention of 8 x 4 x 512 x 512 ran 1.8 times as fast on one core with this (docs/LOG.md).
    It holds for the whole process and changes no result; only work on a CPU asks for it.

    Args:
        of_any_size: tensors above 32 MiB too, which glibc otherwise always maps, from one heap for all
            threads, since other heaps end at 64 MiB. For work on many tensors of few sizes: what is kept
            serves other sizes less well.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    if of_any_size and not (mallopt(_M_ARENA_MAX, 1) and mallopt(_M_MMAP_MAX, 0)):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, 1 << 30))
