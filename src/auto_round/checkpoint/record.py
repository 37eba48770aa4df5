"""What an output folder says of itself: that it is ours, which files in it are, and what was asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from auto_round.checkpoint.disk import atomic_write_json, temporary_of

OURS = "autoround_version"
"""Key at the top of quantization_config.json or report.json by which a folder of ours is known."""

RECORD = ".auto_round.json"
"""File of the record, at the top of the output."""

PARTIAL = ".partial"
"""End of the name of an unfinished output."""

_WEIGHTS = (".safetensors", ".gguf")
"""Files whose length tells that they are whole; the others may be edited by their owner."""


@dataclass(frozen=True, slots=True)
class Record:
    """What was asked for, and what was written.

    Attributes:
        asked: digest of the request: settings, data and model.
        files: path below the folder -> bytes of a file of weights, None for others, which may be edited.
    """

    asked: str
    files: Mapping[str, int | None]


def write_record(folder: Path, asked: str) -> None:
    """Write down what lies in a folder that is about to be finished.

    Raises:
        ConfigError: disk full, no permission.
    """
    own = folder / RECORD
    itself = (own, temporary_of(own))  # a run that was killed while it wrote the record left these
    files = {
        path.relative_to(folder).as_posix(): _checked_size(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in itself
    }
    atomic_write_json(own, {"asked": asked, "files": files})


def add_to_record(folder: Path, name: str) -> None:
    """Write down a file that was made for a finished output later, so that it goes where the output goes.

    Args:
        folder: of the file: an output, or the folder of one of its formats.
        name: of the file.
    """
    for top in (folder, folder.parent):
        record = read_record(top)
        if record is not None:
            path = (folder / name).relative_to(top).as_posix()
            files = {**record.files, path: _checked_size(folder / name)}
            atomic_write_json(top / RECORD, {"asked": record.asked, "files": files})
            return


def read_record(folder: Path) -> Record | None:
    """Read the record of a folder; None where there is none that can be read."""
    value = _json_object(folder / RECORD)
    asked, files = value.get("asked"), value.get("files")
    if not isinstance(asked, str) or not isinstance(files, dict):
        return None
    return Record(asked, files)


def is_finished(folder: Path, asked: str) -> bool:
    """True when the folder holds, whole, what the same request gave before."""
    record = read_record(folder)
    if record is None or record.asked != asked:
        return False
    return all(_is_whole(folder / name, size) for name, size in record.files.items())


def is_ours(folder: Path) -> bool:
    """True when this package wrote the folder."""
    marked = (_json_object(folder / name) for name in ("quantization_config.json", "report.json"))
    return read_record(folder) is not None or any(OURS in value for value in marked)


def foreign_names(folder: Path) -> list[str]:
    """Names at the top of a folder that keep an output from taking its place, sorted.

    None do where the folder has a record: what else lies in it moves along. A folder without one may hold
    nothing but outputs of this package. An unfinished output may be at work, so it is never moved.
    """
    names = sorted(file.name for file in folder.iterdir())
    unfinished = [name for name in names if name.endswith(PARTIAL)]
    if unfinished or read_record(folder) is not None:
        return unfinished
    return [name for name in names if not is_ours(folder / name)]


def in_the_way(old: Path, new: Path) -> list[str]:
    """Paths of both folders that this package did not write in `old`: nothing may take their place."""
    return [name for name in _others(old) if (new / name).exists() and not is_ours(old / name)]


def move_along(old: Path, new: Path) -> None:
    """Move what is no part of the output in `old` to `new`, which has taken its place.

    May be cut short at any point and called again.
    """
    for name in _others(old):
        if not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(new / name)


def _others(folder: Path) -> list[str]:
    """Paths below a folder that are no part of its output, whole folders where nothing in them is."""
    record = read_record(folder)
    if record is None and is_ours(folder):
        return []  # of a version that kept no record: all of it
    own = {RECORD} if record is None else {RECORD, *record.files}
    parents = {parent.as_posix() for name in own for parent in PurePosixPath(name).parents}
    found = []
    for place, folders, files in os.walk(folder):
        names = {(Path(place, name).relative_to(folder).as_posix()): name for name in (*folders, *files)}
        found += [path for path in names if path not in own and path not in parents]
        folders[:] = [name for path, name in names.items() if path in parents]
    return sorted(found)


def _checked_size(path: Path) -> int | None:
    """Bytes of a file whose length tells that it is whole."""
    return path.stat().st_size if path.suffix in _WEIGHTS else None


def _is_whole(path: Path, size: int | None) -> bool:
    return path.is_file() and (path.suffix not in _WEIGHTS or path.stat().st_size == size)


def _json_object(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
