"""Output folders of a job: every format written from the same codes, as blocks finish."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from auto_round.checkpoint.disk import bytes_of
from auto_round.checkpoint.journal import Journal
from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.writer import ShardWriter
from auto_round.errors import CheckpointError, NumericsError
from auto_round.export.exporter import Exporter, OneFile, StoresAll
from auto_round.export.gguf.exporter import GgufExporter
from auto_round.facts.layer import Layer
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.pipeline.gguf_output import Rest
from auto_round.pipeline.job import Job
from auto_round.pipeline.plan_table import manifest_of

Written = dict[str, int]
"""`<format>/<tensor>` -> CRC-32 of its bytes."""

READERS = 2
"""Tensors that are read back at a time."""


class Outputs:
    """One shard writer for each format; a tensor is durable when `sync` returned.

    Attributes:
        names: every tensor that some format stores, as `<format>/<tensor>`.
    """

    @classmethod
    @contextmanager
    def open(
        cls, job: Job, folders: Mapping[str, Path], *, done: Iterable[str], fresh: bool
    ) -> Iterator[Outputs]:
        """Open the folders while the context lasts; arguments as for the class."""
        outputs = cls(job, folders, done=done, fresh=fresh)
        try:
            yield outputs
        finally:
            for writer in outputs._writers.values():
                writer.close()

    def __init__(self, job: Job, folders: Mapping[str, Path], *, done: Iterable[str], fresh: bool) -> None:
        """Create the shards, or continue those of an interrupted run.

        Args:
            job: what is written.
            folders: format -> folder.
            done: tensors that the journal vouches for, as `<format>/<tensor>`.
            fresh: begin anew.
        """
        self._job = job
        self._writers: dict[str, ShardWriter] = {}
        self._dtypes: dict[str, dict[str, torch.dtype]] = {}
        finished = list(done)
        for name, exporter in job.exporters.items():
            specs = {
                t: (spec.dtype, tuple(spec.shape)) for t, spec in manifest_of(job, exporter).specs.items()
            }
            self._dtypes[name] = {tensor: dtype for tensor, (dtype, _) in specs.items()}
            shards = exporter.shards if isinstance(exporter, OneFile) else None
            folder = folders[name]
            folder.mkdir(parents=True, exist_ok=True)
            size = job.options.output.max_shard_size
            if fresh:
                self._writers[name] = ShardWriter.create(folder, specs, max_shard_bytes=size, shards=shards)
            else:
                own = [t.partition("/")[2] for t in finished if t.partition("/")[0] == _key(name)]
                self._writers[name] = ShardWriter.reopen(
                    folder, specs, max_shard_bytes=size, written=own, shards=shards
                )

    def put(self, layer: Layer, q: QuantizedLayer) -> Written:
        """Write one quantized layer in every format; what was written."""
        written = {}
        for name, exporter in self._job.exporters.items():
            for tensor_name, tensor in exporter.encode(layer, q).items():
                self._writers[name].put(tensor_name, tensor)
                written[f"{_key(name)}/{tensor_name}"] = checksum(tensor)
        return written

    def put_plain(self, tensor_name: str, tensor: Tensor) -> Written:
        """Write a tensor that no format encodes, in the dtype that each format has for it."""
        written = {}
        for name, writer in self._writers.items():
            for part, stored in self._plain(name, tensor_name, tensor).items():
                writer.put(part, stored)
                written[f"{_key(name)}/{part}"] = checksum(stored)
        return written

    def put_embedding(self) -> tuple[Tensor, Written] | None:
        """Round and write the token embedding, where a format rounds it, before anything else.

        Folders that hold plain weights beside such a file get what the rounded one came to.

        Returns:
            What it came to, `[vocabulary, width]` float32, and what was written (nothing when an earlier run
            did); None when every format keeps it.
        """
        for name, writer in self._writers.items():
            rest = self._rest(name)
            found = None if rest is None else rest.write_embedding(writer)
            if found is not None:
                source, weight, parts = found
                written = {f"{_key(name)}/{part}": checksum(t) for part, t in parts.items()}
                return weight, written | self._put_beside(source, weight)
        return None

    def _put_beside(self, tensor_name: str, tensor: Tensor) -> Written:
        """Write a tensor of the source that one format rounded where others store it as it is."""
        written = {}
        for name, writer in self._writers.items():
            if self._rest(name) is None and tensor_name in writer.missing:
                for part, stored in self._plain(name, tensor_name, tensor).items():
                    writer.put(part, stored)
                    written[f"{_key(name)}/{part}"] = checksum(stored)
        return written

    def _rest(self, name: str) -> Rest | None:
        """How to make what a GGUF file holds besides layers; None for a format that copies it."""
        exporter = self._job.exporters[name]
        if not isinstance(exporter, GgufExporter):
            return None
        return Rest(exporter, self._job.source.read_tensor, self._job.effort, self._job.device)

    def copy_rest(self) -> None:
        """Copy from the source what has not been written: embeddings, norms, biases, kept layers."""
        source = self._job.source
        folders = []
        for name, writer in self._writers.items():
            rest = self._rest(name)
            if rest is not None:
                rest.write(writer)
            else:
                self._recast(name, writer)
                folders.append(writer)
        if source.folder is None:
            for writer in folders:
                for name in writer.missing:
                    writer.put(name, source.read_tensor(name))
            return
        with Checkpoint.open(source.folder) as checkpoint:
            for writer in folders:
                for name in writer.missing:
                    writer.copy(name, checkpoint)

    def _plain(self, name: str, tensor_name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """What a format stores for a tensor that it does not quantize."""
        exporter = self._job.exporters[name]
        if isinstance(exporter, StoresAll):
            return exporter.encode_plain(tensor_name, tensor)
        return {tensor_name: _cast(tensor_name, tensor, self._dtypes[name][tensor_name])}

    def _recast(self, name: str, writer: ShardWriter) -> None:
        """Write what a format stores in another dtype than the source."""
        source, dtypes = self._job.source, self._dtypes[name]
        for tensor in writer.missing:
            if dtypes[tensor] != source.tensors[tensor].dtype:
                writer.put(tensor, _cast(tensor, source.read_tensor(tensor), dtypes[tensor]))

    def sync(self) -> None:
        """Return when everything written so far would survive a power cut."""
        for writer in self._writers.values():
            writer.sync()

    def seal(self) -> None:
        """Check that nothing is missing and write the indices."""
        for writer in self._writers.values():
            writer.seal()

    @property
    def nbytes(self) -> dict[str, int]:
        """Format -> bytes of its weight files."""
        return {name: writer.nbytes for name, writer in self._writers.items()}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype.

    Raises:
        NumericsError: numbers beyond the range of that dtype.
    """
    stored = tensor.to(dtype)
    lost = int((stored.isinf() & ~tensor.isinf()).sum()) if dtype != tensor.dtype else 0
    if lost:
        raise NumericsError(
            f"{name}: {lost} numbers are too large for {str(dtype).removeprefix('torch.')}, in which this "
            "output format stores them; use the format auto_round"
        )
    return stored


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(bytes_of(tensor.detach().cpu().contiguous()))


def check_written(journal: Journal, folders: Mapping[str, Path], exporters: Mapping[str, Exporter]) -> int:
    """Read every journaled tensor back from disk and compare its checksum; how many were read.

    Raises:
        CheckpointError: what lies on disk is not what was written; names folder and tensor.
    """
    count = 0
    with ThreadPoolExecutor(READERS) as pool:
        for name, folder in folders.items():
            with _reading_back(exporters[name], folder) as read:
                promised = dict(_journaled(journal, _key(name)))
                for tensor, found in zip(promised, pool.map(read, promised), strict=True):
                    if found != promised[tensor]:
                        raise CheckpointError(
                            f"{folder}: {tensor} on disk is not what was written: a failing disk? Remove the "
                            "unfinished folder and run the same command again"
                        )
                    count += 1
    return count


@contextmanager
def _reading_back(exporter: Exporter, folder: Path) -> Iterator[Callable[[str], int]]:
    """CRC-32 of a tensor's bytes on disk, by its name."""
    if isinstance(exporter, OneFile):
        yield lambda name: zlib.crc32(exporter.read_part(folder, name))
        return
    with Checkpoint.open(folder) as checkpoint:
        yield lambda name: checksum(checkpoint.read(name))


def _journaled(journal: Journal, key: str) -> Iterator[tuple[str, int]]:
    """Names and checksums of the tensors of one format."""
    for entry in journal.entries:
        for tensor, expected in entry["tensors"].items():
            owner, _, name = tensor.partition("/")
            if owner == key:
                yield name, expected


def _key(name: str) -> str:
    """Format name as the first part of a journaled tensor name."""
    return name.replace("/", "-")
