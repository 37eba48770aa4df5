"""A lock on an open file that the system releases when the process ends."""

from __future__ import annotations

import errno
import sys

HELD = frozenset({errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK})
"""Error numbers that mean that another process holds the lock."""

if sys.platform == "win32":
    import msvcrt

    def try_lock(fd: int) -> None:
        """Lock an open file for this process, without waiting.

        Raises:
            OSError: another process holds the lock (`HELD`), or the file system has none.
        """
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def try_lock(fd: int) -> None:
        """Lock an open file for this process, without waiting.

        Raises:
            OSError: another process holds the lock (`HELD`), or the file system has none.
        """
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
