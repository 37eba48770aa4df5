"""Pages of files that were mapped into memory: given back once a kernel has what it needs of them.

A checkpoint is mapped, and each page that is read stays in memory as long as any tensor of the file is held.
While weights are handed to kernels, a model would so be held twice.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

_MADV_DONTNEED = 4
"""The pages are not needed; whoever reads them again reads the file. Source: madvise(2)."""


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """Where files lie in the memory of this process.

    Attributes:
        starts: first address of each, ascending.
        ends: the address behind each.
    """

    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()

    @classmethod
    def now(cls) -> MappedFiles:
        """As it is now; none where the system does not say so."""
        found = []
        if sys.platform.startswith("linux"):
            with suppress(OSError), open("/proc/self/maps", encoding="utf-8") as file:  # noqa: PTH123
                # "start-end access offset device inode path": memory that is no file's has inode 0.
                fields = (line.split(maxsplit=5) for line in file)
                found = [each[0].split("-") for each in fields if each[4] != "0"]
        ranges = sorted((int(start, 16), int(end, 16)) for start, end in found)
        return cls(tuple(start for start, _ in ranges), tuple(end for _, end in ranges))

    def give_back(self, tensor: Tensor) -> int:
        """Give back the whole pages of a tensor that lies in a file and is needed no more.

        Returns:
            Their bytes; 0 for a tensor that lies elsewhere.
        """
        if tensor.device.type != "cpu":
            return 0
        address = tensor.data_ptr()
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (address + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        place = bisect_right(self.starts, start) - 1
        if place < 0 or end > self.ends[place] or end <= start:
            return 0
        failed = ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED
        )
        return 0 if failed else end - start
