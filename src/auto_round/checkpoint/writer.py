"""Safetensors shards whose headers are written first and whose tensors arrive in any order."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from auto_round.checkpoint.disk import (
    atomic_write_json,
    bytes_of,
    read_at,
    reserve,
    sync_folder,
    write_at,
    writing,
)
from auto_round.checkpoint.header import Spec, build_header, nbytes_of
from auto_round.checkpoint.open_files import OpenFiles
from auto_round.checkpoint.shards import TRANSFORMERS, WeightFiles
from auto_round.checkpoint.tensors import Tensors
from auto_round.errors import CheckpointError, ConfigError, InternalError
from auto_round.units import size

DEFAULT_SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in one shard, as in Transformers."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output, known before any of its tensors.

    Attributes:
        file: file name.
        head: bytes before the first tensor.
        begins: tensor name -> offset in the file, bytes.
        size: length of the whole file, bytes.
    """

    file: str
    head: bytes
    begins: Mapping[str, int]
    size: int


def lay_out(
    specs: Mapping[str, Spec],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    names: WeightFiles = TRANSFORMERS,
) -> tuple[Shard, ...]:
    """Assign tensors to shards in the order given; a tensor larger than a shard gets one of its own."""
    groups: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        size = nbytes_of(spec)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += size
    return tuple(_shard(group, names.shard(i + 1, len(groups))) for i, group in enumerate(groups))


def _shard(specs: Mapping[str, Spec], file: str) -> Shard:
    """One file that holds these tensors."""
    head, begins = build_header(specs)
    return Shard(file, head, begins, len(head) + sum(map(nbytes_of, specs.values())))


class ShardWriter:
    """Output shards, complete in length from the start, filled tensor by tensor.

    Where a tensor lies depends on the manifest only, so that an interrupted and continued run gives the same
    bytes. Putting a tensor again overwrites it. `put`, `copy` and `sync` may be called from several threads.
    Use as a context manager, or call `close`; `seal` writes the index when there are several shards.

    Attributes:
        folder: where the shards lie.
        shards: the files, in order.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, Spec],
        shards: tuple[Shard, ...],
        names: WeightFiles = TRANSFORMERS,
    ) -> None:
        self.folder = folder
        self._names = names
        self.shards = shards
        self._specs = dict(specs)
        self._home = {name: shard for shard in shards for name in shard.begins}
        self._files = OpenFiles(os.O_RDWR | os.O_CREAT, durable=True)
        self._written: set[str] = set()
        self._dirty: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls,
        folder: Path,
        specs: Mapping[str, Spec],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        shards: tuple[Shard, ...] | None = None,
        names: WeightFiles = TRANSFORMERS,
    ) -> ShardWriter:
        """Write all headers and reserve the disk space of all shards, in a folder that exists.

        Args:
            folder: work folder; shards of an earlier attempt in it are removed.
            specs: tensor name -> (dtype, shape), in the order wanted on disk.
            max_shard_bytes: most bytes of tensors per shard.
            shards: files of another format than safetensors, laid out by the caller; None to lay them out.
            names: how the files are called.

        Raises:
            ConfigError: not enough space on the disk, no permission.
        """
        with writing(folder):
            for stale in (
                *folder.glob(names.shards),
                folder / names.single,
                folder / names.index,
            ):
                stale.unlink(missing_ok=True)
        return cls.reopen(folder, specs, max_shard_bytes=max_shard_bytes, shards=shards, names=names)

    @classmethod
    def reopen(
        cls,
        folder: Path,
        specs: Mapping[str, Spec],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        written: Iterable[str] = (),
        shards: tuple[Shard, ...] | None = None,
        names: WeightFiles = TRANSFORMERS,
    ) -> ShardWriter:
        """Continue what `create` began with the same arguments.

        Args:
            folder: the work folder.
            specs: as for `create`.
            max_shard_bytes: as for `create`.
            written: tensors known to be on disk, from the journal.
            shards: as for `create`.
            names: as for `create`.

        Raises:
            ConfigError: not enough space on the disk, no permission.
            CheckpointError: a shard that holds a written tensor is gone or damaged.
        """
        writer = cls(folder, specs, shards or lay_out(specs, max_shard_bytes, names), names)
        writer.mark_written(written)
        try:
            writer._open_shards()
        except BaseException:
            writer.close()
            raise
        return writer

    @property
    def missing(self) -> tuple[str, ...]:
        """Tensors that are yet to be written, in manifest order."""
        return tuple(name for name in self._specs if name not in self._written)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together, headers included."""
        return sum(shard.size for shard in self.shards)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place.

        Raises:
            InternalError: not in the manifest, or not of the dtype and shape that the manifest promises.
            ConfigError: disk full.
        """
        self._check(name, (tensor.dtype, tensor.shape))
        shard = self._home[name]
        data = bytes_of(tensor.detach().cpu().contiguous())
        path = self.folder / shard.file
        with writing(path), self._files.use(path) as fd:
            write_at(fd, data, shard.begins[name])
        self._wrote(name, shard)

    def copy(self, name: str, tensors: Tensors, source_name: str | None = None) -> None:
        """Copy one tensor byte for byte from a model, where it may be called `source_name`.

        Raises:
            InternalError: not in the manifest, or of another dtype or shape there.
            CheckpointError: the model lacks it, or its file ends early.
            ConfigError: disk full.
        """
        source = tensors.spec(source_name or name)
        self._check(name, (source.dtype, source.shape))
        shard = self._home[name]
        path = self.folder / shard.file
        with writing(path), self._files.use(path) as fd:
            tensors.copy_into(source_name or name, fd, shard.begins[name])
        self._wrote(name, shard)

    def mark_written(self, names: Iterable[str]) -> None:
        """Take tensors as written; for those that a journal vouches for.

        Raises:
            InternalError: one of them is not in the manifest.
        """
        for name in names:
            if name not in self._specs:
                raise InternalError(f'tensor "{name}" is not in the manifest')
            self._written.add(name)

    def sync(self) -> None:
        """Return when everything put so far would survive a power cut; call before journaling it."""
        with self._lock:
            dirty, self._dirty = sorted(self._dirty), set()
        for file in dirty:
            path = self.folder / file
            with writing(path), self._files.use(path) as fd:
                os.fsync(fd)

    def seal(self) -> None:
        """Check that nothing is missing, make all of it durable, write the index, close.

        Raises:
            InternalError: some tensors were never written; names them.
            ConfigError: disk full.
        """
        missing = self.missing
        if missing:
            shown = ", ".join(f'"{name}"' for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise InternalError(f"{len(missing)} of {len(self._specs)} tensors were never written: {shown}")
        self.sync()
        if len(self.shards) > 1:
            weight_map = {name: self._home[name].file for name in self._specs}
            total = sum(map(nbytes_of, self._specs.values()))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            atomic_write_json(self.folder / self._names.index, index, sort_keys=True)
        self.close()
        with writing(self.folder):
            sync_folder(self.folder)

    def close(self) -> None:
        """Close all files; what was put stays, and `reopen` continues."""
        self._files.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, name: str, spec: Spec) -> None:
        """Refuse a tensor that the header does not describe."""
        if name not in self._specs:
            raise InternalError(f'tensor "{name}" is not in the manifest')
        dtype, shape = self._specs[name]
        if spec[0] != dtype or tuple(spec[1]) != tuple(shape):
            got = f"{spec[0]} {list(spec[1])}"
            raise InternalError(f'tensor "{name}": the manifest promises {dtype} {list(shape)}, got {got}')

    def _wrote(self, name: str, shard: Shard) -> None:
        """Remember that a tensor is in its file, which is not yet durable."""
        with self._lock:
            self._written.add(name)
            self._dirty.add(shard.file)

    def _open_shards(self) -> None:
        """Open intact shards, and make the others anew after checking that the disk has room for them."""
        anew = []
        for shard in self.shards:
            path = self.folder / shard.file
            with writing(path), self._files.use(path) as fd:
                intact = _intact(fd, shard)
            if not intact:
                self._refuse_loss(shard)
                anew.append(shard)
        self._refuse_full_disk(anew)
        for shard in anew:
            path = self.folder / shard.file
            with writing(path), self._files.use(path) as fd:
                os.ftruncate(fd, 0)
                reserve(fd, shard.size)
                write_at(fd, shard.head, 0)
                os.fsync(fd)
        with writing(self.folder):
            sync_folder(self.folder)

    def _refuse_loss(self, shard: Shard) -> None:
        """Refuse to make a shard anew when the journal says that some of it was written."""
        lost = [name for name in shard.begins if name in self._written]
        if lost:
            raise CheckpointError(
                f'{self.folder / shard.file} is damaged or gone, although it held tensor "{lost[0]}" '
                f"({len(lost)} in all): remove {self.folder} and start again"
            )

    def _refuse_full_disk(self, anew: Iterable[Shard]) -> None:
        """Refuse before any work when the shards to be made cannot fit."""
        with writing(self.folder):
            needed = sum(shard.size for shard in anew)
            free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConfigError(
                f"{self.folder}: the output takes {size(needed)}, but its disk has "
                f"{size(free)} free: free some space or choose another output folder"
            )


def _intact(fd: int, shard: Shard) -> bool:
    """True when the file has the length and the header of this shard."""
    head = bytearray(len(shard.head))
    read_at(fd, memoryview(head), 0)
    return os.fstat(fd).st_size == shard.size and head == shard.head
