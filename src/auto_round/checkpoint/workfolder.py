"""Output folder that appears under its name complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType

from auto_round.checkpoint.disk import open_file, sync_file, sync_folder, writing
from auto_round.checkpoint.lock import HELD, try_lock
from auto_round.errors import ConfigError, InternalError

OURS = "autoround_version"
"""Key at the top of quantization_config.json or report.json by which a folder of ours is known."""

_OUTPUT, _SCRATCH, _REPLACED, _LOCK = "output", "scratch", "replaced", "lock"


class OutputFolder:
    """Everything goes to `<out>.partial`; one rename at the end gives `<out>`.

    `<out>.partial/output` becomes `<out>`; `<out>.partial/scratch` (journal, activations) is dropped then.
    A lock, released by the system when the process dies, keeps a second run out. Leaving the context without
    `seal` keeps the partial folder, so that the same command can continue.

    Attributes:
        out: final path.
        folder: where the files of the output are written until then; exists.
        scratch: folder for what only a continued run needs; exists.
        resumable: True when an earlier run left something to continue.
    """

    def __init__(self, out: Path, lock: int, *, overwrite: bool) -> None:
        self.out = out
        self.partial = _partial_of(out)
        self.folder = self.partial / _OUTPUT
        self.scratch = self.partial / _SCRATCH
        self._lock = lock
        self._overwrite = overwrite
        with writing(self.partial):
            self.resumable = self.folder.is_dir() and self.scratch.is_dir() and any(self.scratch.iterdir())
        if not self.resumable:
            self.discard()

    @classmethod
    def open(cls, out: str | Path, *, overwrite: bool = False) -> OutputFolder:
        """Claim an output path, before any work.

        Args:
            out: final path; parents are made; an empty folder there is taken over.
            overwrite: replace an older output of this package there when the new one is complete.

        Raises:
            ConfigError: something else is there, another run is writing it, or no permission.
        """
        path = Path(out).expanduser().resolve()
        partial = _partial_of(path)
        if not partial.exists():
            refuse_occupied(path, overwrite=overwrite)  # before anything is made
        lock = _take_lock(partial)
        try:
            refuse_occupied(path, overwrite=overwrite)
            return cls(path, lock, overwrite=overwrite)
        except BaseException:
            if not (partial / _OUTPUT).exists():  # what a crash at the end of `seal` left
                shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
            raise

    def seal(self) -> Path:
        """Make every file durable and give the folder its final name; returns it.

        A crash at any point leaves either the partial folder, from which `seal` can be tried again, or the
        whole output.

        Raises:
            ConfigError: meanwhile something else has come to lie there, or no permission.
            InternalError: called after `close`.
        """
        if self._lock < 0:
            raise InternalError(f"{self.out}: sealed or closed before")
        refuse_occupied(self.out, overwrite=self._overwrite)
        with writing(self.out):
            _sync_tree(self.folder)
            if self.out.is_dir() and any(self.out.iterdir()):
                _remove(self.partial / _REPLACED)
                self.out.rename(self.partial / _REPLACED)
            elif self.out.is_dir():
                self.out.rmdir()  # Windows renames nothing onto an empty folder
            self.folder.rename(self.out)
            sync_folder(self.out.parent)
        shutil.rmtree(self.partial, ignore_errors=True)  # the output is whole, whatever remains here
        self.close()
        if os.name == "nt":  # which removes no open file, and the lock was one until now
            shutil.rmtree(self.partial, ignore_errors=True)
        return self.out

    def discard(self) -> None:
        """Drop what was written so far and start with empty folders; `<out>` is not touched."""
        with writing(self.partial):
            for folder in (self.folder, self.scratch):
                _remove(folder)
                folder.mkdir()
        self.resumable = False

    def close(self) -> None:
        """Release the lock; the partial folder stays."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def refuse_occupied(out: Path, *, overwrite: bool = False) -> None:
    """Refuse a path where the output cannot go; also for dry runs.

    Raises:
        ConfigError: a file, a mount point, or a folder that holds something that may not be replaced.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is there and is not a folder: choose another output folder")
    if out.is_mount():
        raise ConfigError(
            f"{out} is a mount point, which cannot be replaced whole: choose a folder inside it"
        )
    with writing(out):
        held = sorted(file.name for file in out.iterdir())
    if not held:
        return
    if overwrite and _is_ours(out):
        return
    remedy = "choose another output folder"
    if _is_ours(out):
        remedy += ", or allow this older output of auto-round to be replaced with --overwrite"
    elif overwrite:
        remedy += " (only a folder written by auto-round is ever replaced)"
    raise ConfigError(f'{out} already holds {len(held)} files ("{held[0]}", ...): {remedy}')


def _partial_of(out: Path) -> Path:
    """Folder beside the output, on the same file system."""
    return out.with_name(out.name + ".partial")


def _is_ours(folder: Path) -> bool:
    """True when this package wrote the folder."""
    for name in ("quantization_config.json", "report.json"):
        try:
            value = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(value, dict) and OURS in value:
            return True
    return False


def _take_lock(partial: Path) -> int:
    """Descriptor that holds the lock of a partial folder."""
    path = partial / _LOCK
    while True:
        with writing(path):
            partial.mkdir(parents=True, exist_ok=True)
            strange = sorted(
                {file.name for file in partial.iterdir()} - {_OUTPUT, _SCRATCH, _REPLACED, _LOCK}
            )
            if strange:
                raise ConfigError(
                    f'{partial} is not an unfinished output ("{strange[0]}" is in it): move it away'
                )
            fd = open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            try_lock(fd)
            if _same_file(fd, path):
                return fd
        except OSError as error:
            os.close(fd)
            if error.errno in HELD:
                message = f"another run is writing {partial}: wait for it, or choose another output folder"
                raise ConfigError(message) from None
            raise ConfigError(
                f"cannot lock {path} ({error.strerror}): choose a folder on a local disk"
            ) from error
        os.close(fd)  # the run that held it has just sealed its output and removed the file


def _same_file(fd: int, path: Path) -> bool:
    """True while the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _sync_tree(folder: Path) -> None:
    """Make all files and names below a folder survive a power cut."""
    for inside in sorted(folder.rglob("*")):
        if inside.is_file() and not inside.is_symlink():
            sync_file(inside)
        elif inside.is_dir():
            sync_folder(inside)
    sync_folder(folder)


def _remove(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
