"""Output folder that appears under its name complete or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from auto_round.checkpoint.disk import open_file, sync_file, sync_folder, writing
from auto_round.checkpoint.lock import HELD, try_lock
from auto_round.checkpoint.record import (
    PARTIAL,
    foreign_names,
    in_the_way,
    is_finished,
    is_ours,
    move_along,
    write_record,
)
from auto_round.errors import ConfigError, InternalError

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
        self._recover()
        with writing(self.partial):
            self.resumable = self.folder.is_dir() and self.scratch.is_dir() and any(self.scratch.iterdir())
        if not self.resumable:
            self.discard()

    @classmethod
    def open(cls, out: str | Path, *, overwrite: bool = False, source: Path | None = None) -> OutputFolder:
        """Claim an output path, before any work.

        Args:
            out: final path; parents are made; an empty folder there is taken over.
            overwrite: write again what is there already, and replace an older output that has no record.
            source: what is read meanwhile, which stays; None where nothing is.

        An output of this package there is replaced when the new one is complete.

        Raises:
            ConfigError: something else is there, it is where this process works, another run is writing it,
                or no permission.
        """
        with writing(Path(out)):
            path = Path(out).expanduser().resolve()
            partial = _partial_of(path)
            unfinished = partial.exists()
        if not unfinished:
            refuse_occupied(path, overwrite=overwrite, source=source)  # before anything is made
        lock = _take_lock(partial)
        try:
            refuse_occupied(path, overwrite=overwrite, source=source)
            return cls(path, lock, overwrite=overwrite)
        except BaseException:
            if not (partial / _OUTPUT).exists():  # what a crash at the end of `seal` left
                shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
            raise

    def holds(self, asked: str) -> bool:
        """True when the output is there already, whole, from the same request (and may stay)."""
        return not self._overwrite and is_finished(self.out, asked)

    def seal(self, asked: str | None = None) -> Path:
        """Make every file durable and give the folder its final name; returns it.

        An older output there goes away; what else lies in its folder moves to the new one. A crash at any
        point leaves either the partial folder, from which `seal` can be tried again, or the whole output.

        Args:
            asked: digest of the request, by which a later run knows this output; None to keep no record.

        Raises:
            ConfigError: meanwhile something else has come to lie there, or no permission.
            InternalError: called after `close`.
        """
        if self._lock < 0:
            raise InternalError(f"{self.out}: sealed or closed before")
        refuse_occupied(self.out, overwrite=self._overwrite)
        with writing(self.out):
            if asked is not None:
                write_record(self.folder, asked)
            _sync_tree(self.folder)
            replaced = self.partial / _REPLACED
            if self.out.is_dir() and any(self.out.iterdir()):
                self._refuse_loss()
                self.out.rename(replaced)
            elif self.out.is_dir():
                self.out.rmdir()  # Windows renames nothing onto an empty folder
            self.folder.rename(self.out)
            if replaced.exists():
                move_along(replaced, self.out)
            sync_folder(self.out.parent)
        shutil.rmtree(self.partial, ignore_errors=True)  # the output is whole, whatever remains here
        self.close()
        if os.name == "nt":  # which removes no open file, and the lock was one until now
            shutil.rmtree(self.partial, ignore_errors=True)
        return self.out

    def abandon(self) -> None:
        """Leave without a trace, unless an earlier run left something to continue."""
        if not self.resumable:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.close()

    def _refuse_loss(self) -> None:
        """Refuse to replace a file that this package did not write."""
        strange = in_the_way(self.out, self.folder)
        if strange:
            raise ConfigError(
                f"{self.out / strange[0]} was not written by auto-round, and the new output has a file of "
                "that name: move it away and run the same command again"
            )

    def _recover(self) -> None:
        """Finish or undo the replacement of an older output that a crash cut short."""
        replaced = self.partial / _REPLACED
        with writing(self.out):
            if not replaced.exists():
                return
            if self.out.exists() and any(self.out.iterdir()):
                move_along(replaced, self.out)
                _remove(replaced)
            else:
                if self.out.is_dir():
                    self.out.rmdir()
                replaced.rename(self.out)

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


def refuse_occupied(out: Path, *, overwrite: bool = False, source: Path | None = None) -> None:
    """Refuse a path where the output cannot go; also for dry runs.

    Args:
        out: final path, resolved.
        overwrite: see `OutputFolder.open`.
        source: see there.

    Raises:
        ConfigError: a file, a mount point, the working directory, the source, or a folder that holds
            something that may not be replaced.
    """
    here, read = Path.cwd(), None if source is None else source.expanduser().resolve()
    for kept, what in ((read, "what is read"), (here, "the working directory")):
        if kept is not None and out in (kept, *kept.parents):
            raise ConfigError(
                f"the finished output would take the place of {out}, which is or holds {what}"
                f"{'' if kept == out else f' ({kept})'}: choose another output folder, such as "
                f"{out / 'quantized'}"
            )
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
        foreign = foreign_names(out)
    if not foreign or (overwrite and is_ours(out) and not foreign[0].endswith(PARTIAL)):
        return
    if foreign[0].endswith(PARTIAL):
        raise ConfigError(
            f"{out / foreign[0]} is an unfinished output inside the output folder: let its run finish, "
            "remove it, or choose another output folder"
        )
    remedy = "choose another output folder"
    if is_ours(out):
        remedy += (
            ", or allow this older output of auto-round to be replaced: --overwrite, in Python overwrite=True"
        )
    elif overwrite:
        remedy += " (only a folder written by auto-round is ever replaced)"
    raise ConfigError(f'{out} already holds {len(held)} files ("{foreign[0]}", ...): {remedy}')


def _partial_of(out: Path) -> Path:
    """Folder beside the output, on the same file system."""
    return out.with_name(out.name + PARTIAL)


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
