"""Output folders of a job: every format written from the same codes, as blocks finish."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from auto_round.checkpoint.disk import bytes_of
from auto_round.checkpoint.journal import Journal
from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.writer import ShardWriter
from auto_round.errors import CheckpointError
from auto_round.export.manifest import make_manifest
from auto_round.models.layer import Layer
from auto_round.numerics.qtensor import QTensor
from auto_round.pipeline.job import Job

Written = dict[str, int]
"""`<format>/<tensor>` -> CRC-32 of its bytes."""


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
        finished = list(done)
        for name, exporter in job.exporters.items():
            listed = make_manifest(exporter, job.plan, job.source.layers, job.source.tensors)
            specs = {tensor: (spec.dtype, tuple(spec.shape)) for tensor, spec in listed.specs.items()}
            folder = folders[name]
            folder.mkdir(parents=True, exist_ok=True)
            size = job.options.output.max_shard_size
            if fresh:
                self._writers[name] = ShardWriter.create(folder, specs, max_shard_bytes=size)
            else:
                own = [t.partition("/")[2] for t in finished if t.partition("/")[0] == _key(name)]
                self._writers[name] = ShardWriter.reopen(folder, specs, max_shard_bytes=size, written=own)

    def put(self, layer: Layer, q: QTensor) -> Written:
        """Write one quantized layer in every format; what was written."""
        written = {}
        for name, exporter in self._job.exporters.items():
            for tensor_name, tensor in exporter.encode(layer, q).items():
                self._writers[name].put(tensor_name, tensor)
                written[f"{_key(name)}/{tensor_name}"] = checksum(tensor)
        return written

    def put_plain(self, tensor_name: str, tensor: Tensor) -> Written:
        """Write a tensor that no format encodes, in the dtype of the source."""
        written = {}
        stored = tensor.to(self._job.source.tensors[tensor_name].dtype)
        for name, writer in self._writers.items():
            writer.put(tensor_name, stored)
            written[f"{_key(name)}/{tensor_name}"] = checksum(stored)
        return written

    def copy_rest(self) -> None:
        """Copy from the source what has not been written: embeddings, norms, biases, kept layers."""
        source = self._job.source
        if source.folder is None:
            for writer in self._writers.values():
                for name in writer.missing:
                    writer.put(name, source.read_tensor(name))
            return
        with Checkpoint.open(source.folder) as checkpoint:
            for writer in self._writers.values():
                for name in writer.missing:
                    writer.copy(name, checkpoint)

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


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(bytes_of(tensor.detach().cpu().contiguous()))


def check_written(journal: Journal, folders: Mapping[str, Path]) -> int:
    """Read every journaled tensor back from disk and compare its checksum; how many were read.

    Raises:
        CheckpointError: what lies on disk is not what was written; names folder and tensor.
    """
    count = 0
    for name, folder in folders.items():
        with Checkpoint.open(folder) as checkpoint:
            for entry in journal.entries:
                for tensor, expected in entry["tensors"].items():
                    key, _, tensor_name = tensor.partition("/")
                    if key != _key(name):
                        continue
                    if checksum(checkpoint.read(tensor_name)) != expected:
                        raise CheckpointError(
                            f"{folder}: {tensor_name} on disk is not what was written: a failing disk? "
                            "Remove the unfinished folder and run the same command again"
                        )
                    count += 1
    return count


def _key(name: str) -> str:
    """Format name as the first part of a journaled tensor name."""
    return name.replace("/", "-")
