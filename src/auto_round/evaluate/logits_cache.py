"""Logits of an original on disk, one file a row: many models can be compared with it at the price of one run.

A folder belongs to one model, dtype and machine; a file to one row of tokens. What is asked for last stays:
when the size limit is reached, the folders that were not used for longest go.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from auto_round.checkpoint.disk import writing
from auto_round.evaluate.subject import Subject

FREE_BYTES: Final = 1 << 30
"""Room that is left on the disk."""
_HEADER_BYTES: Final = 128
"""What a file is longer than its numbers, at most."""
_NAME: Final = "logits"
_SUFFIX: Final = ".safetensors"


@dataclass(frozen=True, slots=True)
class LogitsCache:
    """Logits of one model.

    Attributes:
        folder: where its rows lie.
        limit: bytes that all models together may take; 0 stores nothing.
    """

    folder: Path
    limit: int

    def has(self, row: Tensor) -> bool:
        """Whether the logits of a row of tokens are there."""
        return self._file(row).is_file()

    def get(self, row: Tensor) -> Tensor | None:
        """Logits `[length - 1, vocabulary]` of a row; None where they are not there or not readable."""
        path = self._file(row)
        if not path.is_file():
            return None
        try:
            return load_file(path)[_NAME]
        except (SafetensorError, OSError, KeyError):
            path.unlink(missing_ok=True)
            return None

    def put(self, row: Tensor, logits: Tensor) -> bool:
        """Store the logits of a row, if there is room.

        Raises:
            ConfigError: the folder cannot be written.
        """
        if not self.has_room(logits.numel() * logits.element_size() + _HEADER_BYTES):
            return False
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._file(row)
            unfinished = path.with_suffix(f".{os.getpid()}")
            save_file({_NAME: logits.contiguous().cpu()}, unfinished)
            unfinished.replace(path)
        return True

    def has_room(self, count: int) -> bool:
        """Whether so many bytes fit; folders of other models are removed for them, oldest first."""
        if count > self.limit:
            return False
        root = self.folder.parent
        sizes = {folder: _bytes_of(folder) for folder in _folders(root)}
        for folder in sorted(sizes.keys() - {self.folder}, key=_last_used):
            if sum(sizes.values()) + count <= self.limit and _free(root) - count >= FREE_BYTES:
                break
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]
        return sum(sizes.values()) + count <= self.limit and _free(root) - count >= FREE_BYTES

    def touch(self) -> None:
        """Note that the folder was used."""
        if self.folder.is_dir():
            os.utime(self.folder)

    def _file(self, row: Tensor) -> Path:
        digest = hashlib.sha256(row.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
        return self.folder / f"{digest[:32]}{_SUFFIX}"


def open_cache(root: Path, limit: int, subject: Subject, how: Sequence[str]) -> LogitsCache:
    """The cache of a model.

    Args:
        root: folder of all models' logits.
        limit: bytes that all of them may take.
        subject: the model; its files are known by name, size and time of change.
        how: whatever else decides on the numbers: dtype, device, versions.
    """
    files = [subject.path] if subject.is_gguf else sorted(subject.path.iterdir())
    facts = [*how, platform.machine(), platform.processor(), str(subject.path.resolve())]
    for file in files:
        if file.is_file():
            state = file.stat()
            facts.append(f"{file.name} {state.st_size} {state.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    cache = LogitsCache(root / digest[:32], limit)
    cache.touch()
    return cache


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _bytes_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another run may remove it
            total += path.stat().st_size
    return total


def _last_used(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return folder.stat().st_mtime
    return 0.0


def _free(root: Path) -> int:
    there = next(path for path in (root, *root.parents) if path.exists())
    return shutil.disk_usage(there).free
