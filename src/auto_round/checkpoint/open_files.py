"""Descriptors of many files, of which only a few are open at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from auto_round.checkpoint.disk import open_file
from auto_round.errors import CheckpointError, InternalError

MOST_OPEN = 8
"""Files that stay open beside those in use. A run reads and writes several folders at once, and a process may
be allowed 64 files or fewer; tensors are asked for shard by shard, so that more would hardly be used."""


@dataclass(slots=True)
class _Opened:
    fd: int
    users: int = 0


class OpenFiles:
    """Files opened when they are used and closed when others were used more recently.

    May be used from several threads.

    Args:
        flags: how files are opened, as for `os.open`.
        most: files that stay open beside those in use.
        durable: make what was written durable before a file is closed.
    """

    def __init__(self, flags: int, *, most: int = MOST_OPEN, durable: bool = False) -> None:
        self._flags = flags
        self._most = most
        self._durable = durable
        self._opened: dict[Path, _Opened] = {}
        self._identities: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """Descriptor of a file; it stays open while the context lasts.

        Raises:
            OSError: it cannot be opened.
            CheckpointError: another file lies there than when it was used before.
            InternalError: used after `close`.
        """
        with self._lock:
            if self._closed:
                raise InternalError(f"{path}: used after close")
            opened = self._opened.pop(path, None) or _Opened(self._open(path))
            self._opened[path] = opened  # the last one is the most recently used
            opened.users += 1
        try:
            yield opened.fd
        finally:
            with self._lock:
                opened.users -= 1
                self._close_spare()

    def close(self) -> None:
        """Close all files; using one afterwards is an error."""
        with self._lock:
            self._closed = True
            while self._opened:
                os.close(self._opened.popitem()[1].fd)

    def _open(self, path: Path) -> int:
        fd = open_file(path, self._flags)
        stat = os.fstat(fd)
        found = (stat.st_dev, stat.st_ino)
        if self._identities.setdefault(path, found) != found:
            os.close(fd)
            raise CheckpointError(f"{path}: another file came to lie there while it was used")
        return fd

    def _close_spare(self) -> None:
        """Close the files that were not used for the longest time."""
        spare = [path for path, opened in self._opened.items() if not opened.users]
        for path in spare[: max(0, len(self._opened) - self._most)]:
            fd = self._opened.pop(path).fd
            if self._durable:
                os.fsync(fd)
            os.close(fd)
