"""Append-only record of a run: what it was asked, and which units of work are durable."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from auto_round.checkpoint.disk import atomic_write_bytes, open_file, reading, writing
from auto_round.errors import CheckpointError, ConfigError

_SHOWN_CHARACTERS = 160


class Journal:
    """One JSON object a line, each with its checksum, each on disk before `append` returns.

    A line that a crash cut short is dropped on opening. Use as a context manager, or call `close`.

    Attributes:
        path: the file.
        entries: what was recorded so far, oldest first.
        resumed: True when the file was there already.
    """

    def __init__(self, path: Path, fd: int, entries: list[dict[str, Any]], resumed: bool) -> None:
        self.path = path
        self.entries = entries
        self.resumed = resumed
        self._fd = fd

    @classmethod
    def open(cls, path: Path, signature: Mapping[str, Any]) -> Journal:
        """Continue the journal of the same run, or begin one.

        Args:
            path: the file; its folder exists.
            signature: JSON values that identify the run: settings, data, model. Nested mappings are allowed.

        Raises:
            ConfigError: the journal belongs to a run with another signature; names each key that differs.
            CheckpointError: damaged before its last line.
        """
        wanted = json.loads(json.dumps(signature))
        text = b""
        if path.exists():
            with reading(path):
                text = path.read_bytes()
        lines, good = _parse(text, path)
        if len(lines) == 1 and lines[0].get("signature") != wanted:
            lines = []  # nothing was finished, so nothing is lost by beginning anew
        if lines:
            _refuse_differences(path, lines[0].get("signature", {}), wanted)
        else:
            head = _line({"signature": wanted})
            atomic_write_bytes(path, head)
            good = len(head)
        with writing(path):
            fd = open_file(path, os.O_WRONLY | os.O_APPEND)
            os.ftruncate(fd, good)
        return cls(path, fd, lines[1:], resumed=bool(lines))

    @property
    def finished(self) -> set[str]:
        """Names of the units of work that are complete."""
        return {entry["unit"] for entry in self.entries}

    def append(self, *entries: Mapping[str, Any]) -> None:
        """Record that units of work are complete and durable, an entry each.

        Raises:
            ConfigError: disk full; the journal stays as it was.
        """
        lines = b"".join(map(_line, entries))
        with writing(self.path):
            before = os.fstat(self._fd).st_size
            try:
                view = memoryview(lines)
                while view:
                    view = view[os.write(self._fd, view) :]
                os.fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, before)
                raise
        self.entries.extend(json.loads(json.dumps(entries)))

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JournalCopy(Journal):
    """What the journal of another process holds, kept in memory; nothing is written."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(Path(), -1, [dict(entry) for entry in entries], resumed=True)

    def append(self, *entries: Mapping[str, Any]) -> None:
        """Remember that units of work are complete."""
        self.entries.extend(dict(entry) for entry in entries)


def _line(entry: Mapping[str, Any]) -> bytes:
    """Checksum, space, JSON without newlines, newline."""
    body = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parse(text: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """Entries of all whole lines, and the length of these lines in bytes."""
    entries: list[dict[str, Any]] = []
    good = 0
    broken = 0
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        entry = _entry(line)
        if entry is None:
            broken = broken or number
        elif broken:
            raise CheckpointError(f"{path}: line {broken} is damaged: remove {path.parent} and start again")
        else:
            entries.append(entry)
            good += len(line)
    return entries, good


def _entry(line: bytes) -> dict[str, Any] | None:
    """Object of a whole line whose checksum is right, else None."""
    body = line[9:-1]
    if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(body):
        return None
    value = json.loads(body)
    return value if isinstance(value, dict) else None


def _refuse_differences(path: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare two signatures key by key."""
    before, now = flattened(recorded), flattened(wanted)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if keys:
        lines = [f"{key}: {shown(before.get(key))} then, {shown(now.get(key))} now" for key in keys]
        message = f"cannot continue the unfinished run in {path.parent}, it was started with something else"
        remedy = "give the same again, or remove that folder, or choose another output folder"
        raise ConfigError("\n  - ".join([f"{message}:", *lines]) + f"\n{remedy}")


def flattened(signature: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys; values as JSON text."""
    flat: dict[str, str] = {}
    for key, value in signature.items():
        if isinstance(value, dict) and value:
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.dumps(value)
    return flat


def shown(value: str | None) -> str:
    """A value in a message, cut where it gets long."""
    if value is None:
        return "absent"
    return value if len(value) <= _SHOWN_CHARACTERS else value[: _SHOWN_CHARACTERS - 3] + "..."
