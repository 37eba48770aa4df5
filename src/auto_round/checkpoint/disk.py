"""Durable file operations: whole reads and writes at an offset, kernel copies, atomic files, clear errors."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import AutoRoundError, CheckpointError, ConfigError

CHUNK_BYTES = 8 * 2**20
"""Bytes per step where a copy has to pass through this process."""

# Linux moves at most 0x7FFFF000 bytes in one call; a round number below that keeps later chunks page-aligned.
_CALL_BYTES = 2**30

_BINARY = getattr(os, "O_BINARY", 0)
"""Windows would translate line ends without it."""

_AT_OFFSETS = hasattr(os, "preadv") and hasattr(os, "pwrite")
"""Whether the system reads and writes at offsets; Windows has one position for all users of a descriptor."""

_SEEKING = threading.Lock()

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_PERMISSION = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_BAD_PATH = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY}
)
_NO_KERNEL_COPY = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised while writing `path` into an error with a remedy.

    Raises:
        ConfigError: disk full or over quota, no permission, read-only file system, impossible path.
        CheckpointError: any other failure of the file system.
    """
    try:
        yield
    except AutoRoundError:
        raise
    except OSError as error:
        if error.errno in _NO_SPACE:
            message = (
                f"disk full while writing {path}: free some space and run the same command again to continue"
            )
            raise ConfigError(message) from error
        if error.errno in _NO_PERMISSION:
            message = f"no permission to write {path} ({error.strerror}): choose another output folder"
            raise ConfigError(message) from error
        message = f"cannot write {path}: {error.strerror or error}"
        if error.errno in _BAD_PATH:
            raise ConfigError(f"{message}; choose another output folder") from error
        raise CheckpointError(message) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised while reading `path` into an error with a remedy.

    Raises:
        ConfigError: no permission.
        CheckpointError: any other failure of the file system.
    """
    try:
        yield
    except AutoRoundError:
        raise
    except PermissionError as error:
        raise ConfigError(f"no permission to read {path}: change its mode or its owner") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def refuse_place(path: Path) -> None:
    """Refuse a path where no folder can be made; nothing is made or changed.

    Raises:
        ConfigError: a file lies in the way, the folder that is there may not be written, or the path holds a
            NUL character, which no system takes.
    """
    if "\0" in str(path):
        raise ConfigError(f"cannot write {str(path)!r}: a path holds no NUL character; leave it out")
    whole = path.expanduser().absolute()
    above = next(part for part in whole.parents if os.path.lexists(part))
    for there in (above, whole):
        if os.path.lexists(there) and not there.is_dir():
            raise ConfigError(f"cannot write {path}: {there} is not a folder; choose another output folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"no permission to write {path} in {above}: choose another output folder")


def refuse_file(path: Path) -> None:
    """Refuse a path where no file can be written; nothing is made or changed.

    Raises:
        ConfigError: it is a folder, its folder is not there, or it may not be written.
    """
    whole = path.expanduser().absolute()
    if whole.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file in it")
    if not whole.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {whole.parent}")
    if not os.access(whole if whole.exists() else whole.parent, os.W_OK):
        raise ConfigError(f"no permission to write {path}: choose another place")


def bytes_of(tensor: Tensor) -> memoryview:
    """Writable view of the memory of a contiguous CPU tensor, one item a byte."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def open_file(path: Path, flags: int) -> int:
    """Descriptor of a file of bytes that no child process inherits; flags as for `os.open`."""
    return os.open(path, flags | _BINARY, 0o666)


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from the file at `offset`; returns the bytes read, fewer only at the file's end."""
    done = 0
    while done < len(view):
        count = _read_some(fd, view[done : done + _CALL_BYTES], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += _write_some(fd, view[done : done + _CALL_BYTES], offset + done)


def _read_some(fd: int, view: memoryview, offset: int) -> int:
    """Read once at an offset; returns the bytes read."""
    if _AT_OFFSETS:
        return os.preadv(fd, [view], offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        found = os.read(fd, min(len(view), CHUNK_BYTES))
    view[: len(found)] = found
    return len(found)


def _write_some(fd: int, view: memoryview, offset: int) -> int:
    """Write once at an offset; returns the bytes written."""
    if _AT_OFFSETS:
        return os.pwrite(fd, view, offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view[:CHUNK_BYTES])


def copy_at(source: int, source_offset: int, target: int, target_offset: int, count: int) -> int:
    """Copy `count` bytes between files, inside the kernel where it can; returns the bytes copied.

    Fewer than `count` are copied only when the source ends early.
    """
    done = _kernel_copy(source, source_offset, target, target_offset, count)
    if done == count:
        return done
    buffer = memoryview(bytearray(min(CHUNK_BYTES, count - done)))
    while done < count:
        got = read_at(source, buffer[: count - done], source_offset + done)
        if got == 0:
            break
        write_at(target, buffer[:got], target_offset + done)
        done += got
    return done


def _kernel_copy(source: int, source_offset: int, target: int, target_offset: int, count: int) -> int:
    """Bytes copied by `copy_file_range` before it ended or refused; 0 where the system has none."""
    done = 0
    if sys.platform == "linux":
        while done < count:
            step = min(_CALL_BYTES, count - done)
            try:
                got = os.copy_file_range(source, target, step, source_offset + done, target_offset + done)
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    break
                raise
            if got == 0:  # the end, or a file system that pretends so: the caller's plain copy finds out
                break
            done += got
    return done


def reserve(fd: int, size: int) -> None:
    """Give the file `size` bytes, with disk blocks behind them where the file system can promise that."""
    os.ftruncate(fd, size)
    if sys.platform == "linux" and size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def sync_file(path: Path) -> None:
    """Make the bytes of a file survive a power cut."""
    fd = open_file(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows asks for the right to write
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder survive a power cut."""
    if os.name == "nt":  # its folders cannot be opened, and its file system keeps a log of names
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[int]:
    """Yield a descriptor whose bytes become `path` on leaving, all of them or none.

    Args:
        path: the file.
        durable: it is to survive a power cut.

    Raises:
        ConfigError: disk full, no permission.
        CheckpointError: any other failure of the file system.
    """
    temporary = temporary_of(path)
    with writing(path):
        fd = open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            try:
                yield fd
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)  # before the file gets its name: Windows renames no open file
            temporary.replace(path)
            if durable:
                sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def temporary_of(path: Path) -> Path:
    """Where the bytes of a file lie until it is whole.

    The name follows from `path` alone, so that a run continued after a crash replaces what the crash left.
    """
    return path.with_name(f".{path.name}.tmp")


def atomic_write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file that is either there in full or not at all, even after a power cut.

    Raises:
        ConfigError: disk full, no permission.
        CheckpointError: any other failure of the file system.
    """
    with replacing(path) as fd:
        write_at(fd, data, 0)


def atomic_write_json(path: Path, value: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Write a JSON object as `atomic_write_bytes` does: two spaces, UTF-8, newline at the end."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys)
    atomic_write_bytes(path, (text + "\n").encode())
