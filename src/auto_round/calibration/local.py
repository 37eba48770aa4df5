"""Records of files on this machine: `.json`, `.jsonl`, `.txt`, `.parquet`, or a folder of them."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar, overload

from auto_round.calibration.registry import TEXT_FIELDS
from auto_round.errors import ConfigError, MissingError
from auto_round.log import logger

SUFFIXES = (".json", ".jsonl", ".txt", ".parquet")
WHOLE = "train"
"""Name of the only split of a file without splits, as in the package `datasets`."""
TEXT_PIECE = 65_536
"""A text file is cut at line ends in pieces of about this many bytes."""

T = TypeVar("T")


class Lazy(Sequence[T], Generic[T]):
    """A sequence whose entries are read when asked for."""

    def __init__(self, count: int, read: Callable[[int], T]) -> None:
        self._indices = range(count)
        self._read = read

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self._read(i) for i in self._indices[index]]
        return self._read(self._indices[index])


def chain(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """Return the entries of all parts, one part after the other, still read when asked for."""
    ends = list(accumulate(len(part) for part in parts))

    def read(index: int) -> T:
        part = bisect_right(ends, index)
        return parts[part][index - (ends[part - 1] if part else 0)]

    return parts[0] if len(parts) == 1 else Lazy(ends[-1] if ends else 0, read)


def read_path(path: Path, splits: Sequence[str]) -> Sequence[object]:
    """Return the records of a file, or of all files under a folder in the order of their names.

    Args:
        path: a file with one of `SUFFIXES`, or a folder.
        splits: keys of a `.json` file that holds a mapping of lists; empty: all of it.

    Raises:
        ConfigError: it is not there, not readable, of another kind, or has no such split.
    """
    files = check_path(path)
    if path.is_dir():
        return chain([read_path(file, splits) for file in files])
    suffix = path.suffix.lower()
    if suffix != ".json":
        splits = without_splits(path, splits)
    try:
        return _READERS[suffix](path, splits)
    except UnicodeDecodeError as error:
        raise ConfigError(f"data set {path}: not UTF-8 text at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"data set {path}: cannot be read: {error.strerror or error}") from error


def check_path(path: Path) -> list[Path]:
    """Files that `read_path` would read; nothing is opened.

    Raises:
        ConfigError: it is not there, or holds no file of a kind that can be read.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise ConfigError(f"data set {path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        return files
    if not path.is_file():
        raise MissingError(f"data set {path}: no such file; relative paths begin at {Path.cwd()}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(
            f"data set {path}: cannot read {suffix or 'a file without a suffix'}; "
            f"expected {', '.join(SUFFIXES)}"
        )
    if not path.stat().st_size:
        raise ConfigError(f"data set {path}: the file is empty")
    return [path]


def without_splits(name: str | Path, splits: Sequence[str]) -> Sequence[str]:
    """No splits, said where others than the whole were asked for."""
    if splits and tuple(splits) != (WHOLE,):
        logger.warning("data set %s has no splits, so split=%s has no effect", name, "+".join(splits))
    return ()


def _json(path: Path, splits: Sequence[str]) -> Sequence[object]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the wrong name are common
            return _json_lines(path, without_splits(path, splits))
        raise ConfigError(
            f"data set {path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"data set {path}: nested too deeply for a data set") from error
    if isinstance(data, list):
        without_splits(path, splits)
        return data
    if isinstance(data, dict):
        return _json_columns(path, data, splits)
    raise ConfigError(
        f"data set {path}: holds a {type(data).__name__}; expected a list, or a mapping of lists"
    )


def _json_columns(path: Path, data: Mapping[str, object], splits: Sequence[str]) -> Sequence[object]:
    if missing := [name for name in splits if not isinstance(data.get(name), list)]:
        raise ConfigError(f"data set {path}: no split {missing}; the file has {sorted(data)}")
    if not splits and "input_ids" in data:
        return [data]
    chosen = (
        list(splits)
        or [name for name in TEXT_FIELDS if isinstance(data.get(name), (list, str))][:1]
        or list(data)
    )
    records: list[object] = []
    for name in chosen:
        value = data[name]
        records.extend(value if isinstance(value, list) else [value])
    return records


def _json_lines(path: Path, splits: Sequence[str]) -> Sequence[object]:
    del splits
    lines: list[tuple[int, int]] = []
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                lines.append((offset, number))
            offset += len(line)

    def read(index: int) -> object:
        offset, number = lines[index]
        with path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            return json.loads(line.decode("utf-8-sig"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"data set {path}, line {number}: not JSON: {error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"data set {path}, line {number}: not UTF-8 text") from error

    return Lazy(len(lines), read)


def _text(path: Path, splits: Sequence[str]) -> Sequence[object]:
    del splits
    cuts = [0]
    with path.open("rb") as file:
        offset = 0
        for line in file:
            offset += len(line)
            if offset - cuts[-1] >= TEXT_PIECE:
                cuts.append(offset)
    if offset > cuts[-1]:
        cuts.append(offset)

    def read(index: int) -> object:
        with path.open("rb") as file:
            file.seek(cuts[index])
            return file.read(cuts[index + 1] - cuts[index]).decode("utf-8-sig", errors="replace")

    return Lazy(len(cuts) - 1, read)


def _parquet(path: Path, splits: Sequence[str]) -> Sequence[object]:
    del splits
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"data set {path}: Parquet files need a package that is missing: pip install pyarrow; or convert "
            "the file to .jsonl"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = {"input_ids", "attention_mask", "messages", "conversations", *TEXT_FIELDS} & set(names)
        table = file.read(columns=sorted(wanted or names))
    except pyarrow.ArrowException as error:
        raise ConfigError(f"data set {path}: not a readable Parquet file: {error}") from error

    def read(index: int) -> object:
        record: dict[str, object] = table.slice(index, 1).to_pylist()[0]
        return record

    return Lazy(table.num_rows, read)


_READERS: Mapping[str, Callable[[Path, Sequence[str]], Sequence[object]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".txt": _text,
    ".parquet": _parquet,
}
