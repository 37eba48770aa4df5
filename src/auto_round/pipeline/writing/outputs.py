"""Output folders of a job: every format written from the same codes, as blocks finish."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from auto_round.checkpoint.disk import bytes_of
from auto_round.checkpoint.journal import Journal
from auto_round.checkpoint.writer import ShardWriter
from auto_round.errors import CheckpointError
from auto_round.export.exporter import Exporter
from auto_round.export.manifest import Manifest
from auto_round.facts.attention import Attention
from auto_round.facts.layer import Layer
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.plan_table import manifest_of
from auto_round.pipeline.writing.rest import cast, make_rest, write_rest
from auto_round.pipeline.writing.stacks import Stacks

Written = dict[str, int]
"""`<format>/<tensor>` -> CRC-32 of its bytes."""

READERS = 2
"""Tensors that are read back at a time."""


@dataclass(frozen=True, slots=True)
class _Output:
    """One format's folder while it is written."""

    name: str
    exporter: Exporter
    manifest: Manifest
    writer: ShardWriter
    stacks: Stacks

    def put(self, tensors: Mapping[str, Tensor]) -> Written:
        """Write tensors of the manifest, or matrices of its stacks; what was written."""
        ready = self.stacks.complete(tensors)
        for name, tensor in ready.items():
            self.writer.put(name, tensor)
        return {f"{_key(self.name)}/{name}": checksum(tensor) for name, tensor in ready.items()}

    def put_plain(self, source: str, value: Tensor) -> Written:
        """Write a tensor of the source that is not quantized, in the dtype that the format has for it."""
        parts = self.exporter.encode_plain(source, value)
        return self.put({n: cast(n, t, self.manifest.specs[n].dtype) for n, t in parts.items()})


class Outputs:
    """One shard writer for each format; a tensor is durable when `sync` returned."""

    @classmethod
    @contextmanager
    def open(cls, job: Job, folders: Mapping[str, Path], journal: Journal | None) -> Iterator[Outputs]:
        """Open the folders while the context lasts.

        Args:
            job: what is written.
            folders: format -> folder.
            journal: of the run; says what an interrupted one wrote. None to begin anew.
        """
        entries = () if journal is None else journal.entries
        done = [name for entry in entries for name in entry["tensors"]]
        outputs = cls(job, folders, done=done, fresh=journal is None or not journal.resumed)
        try:
            yield outputs
        finally:
            for output in outputs._outputs:
                output.writer.close()

    def __init__(self, job: Job, folders: Mapping[str, Path], *, done: Iterable[str], fresh: bool) -> None:
        """Create the shards, or continue those of an interrupted run.

        Args:
            job: what is written.
            folders: format -> folder; none where another process writes.
            done: tensors that the journal vouches for, as `<format>/<tensor>`.
            fresh: begin anew.
        """
        self._job = job
        self._outputs: list[_Output] = []
        finished = [tensor.partition("/") for tensor in done]
        size, called = job.largest_shard, job.files
        for name, folder in folders.items():
            exporter = job.exporters[name]
            manifest = manifest_of(job, exporter)
            specs = {t: (spec.dtype, tuple(spec.shape)) for t, spec in manifest.specs.items()}
            shards = exporter.shards(manifest)
            folder.mkdir(parents=True, exist_ok=True)
            if fresh:
                writer = ShardWriter.create(folder, specs, max_shard_bytes=size, shards=shards, names=called)
            else:
                own = [tensor for key, _, tensor in finished if key == _key(name)]
                writer = ShardWriter.reopen(
                    folder, specs, max_shard_bytes=size, written=own, shards=shards, names=called
                )
            self._outputs.append(_Output(name, exporter, manifest, writer, Stacks(manifest)))

    def put(self, layer: Layer, q: QuantizedLayer) -> Written:
        """Write one quantized layer in every format; what was written."""
        return self._in_each(lambda output: output.put(output.exporter.encode(layer, q)))

    def put_encoded(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Written:
        """Write what another process encoded: format -> tensors of a layer; what was written."""
        return self._in_each(lambda output: output.put(tensors[output.name]))

    def put_plain(self, tensor_name: str, tensor: Tensor) -> Written:
        """Write a tensor that no format encodes, in the dtype that each format has for it."""
        return self._in_each(lambda output: output.put_plain(tensor_name, tensor))

    def put_scales(self, attention: Attention, scales: Mapping[str, Tensor]) -> Written:
        """Write the scales of an attention in every format; what was written."""
        return self._in_each(lambda output: output.put(output.exporter.encode_scales(attention, scales)))

    def _in_each(self, write: Callable[[_Output], Written]) -> Written:
        written: Written = {}
        for output in self._outputs:
            written |= write(output)
        return written

    @property
    def share_embedding(self) -> bool:
        """Whether an output rounds the token embedding, and another one is to hold what that comes to."""
        return len(self._outputs) > 1 and any(output.exporter.embedding for output in self._outputs)

    def put_embedding(self) -> tuple[Tensor, Written] | None:
        """Round and write the token embedding, where a format rounds it, before anything else.

        Folders that hold plain weights beside such a file get what the rounded one came to.

        Returns:
            What it came to, `[vocabulary, width]` float32, and what was written (nothing when an earlier run
            did); None when every format keeps it.
        """
        for output in self._outputs:
            if output.exporter.embedding is None:
                continue
            part, source = output.exporter.embedding
            weight, written = self._embedding(output, part)
            for other in self._outputs:
                if source in other.manifest.copied and source in other.writer.missing:
                    written |= other.put_plain(source, weight)
            return weight, written
        return None

    def _embedding(self, output: _Output, part: str) -> tuple[Tensor, Written]:
        """The rounded embedding, made and written unless an earlier run did."""
        written: Written = {}
        if part in output.writer.missing:
            stored = make_rest(self._job, output.exporter, part, self._job.source.read_tensor)
            written = output.put({part: stored})
        else:
            with output.exporter.reading(output.writer.folder) as read:
                stored = read(part)
        return output.exporter.decode_rest(part, stored), written

    def copy_rest(self) -> None:
        """Write all tensors that are no quantized layers: embeddings, norms, biases, kept layers."""
        for output in self._outputs:
            write_rest(self._job, output.exporter, output.manifest, output.writer)

    def sync(self) -> None:
        """Return when everything written so far would survive a power cut."""
        for output in self._outputs:
            output.writer.sync()

    def seal(self) -> None:
        """Check that nothing is missing and write the indices."""
        for output in self._outputs:
            output.writer.seal()

    @property
    def nbytes(self) -> dict[str, int]:
        """Format -> bytes of its weight files."""
        return {output.name: output.writer.nbytes for output in self._outputs}


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
            with exporters[name].reading(folder) as read:
                promised = dict(_journaled(journal, _key(name)))
                found_on_disk = pool.map(partial(_checksum_on_disk, read), promised)
                for tensor, found in zip(promised, found_on_disk, strict=True):
                    if found != promised[tensor]:
                        raise CheckpointError(
                            f"{folder}: {tensor} on disk is not what was written: a failing disk? Remove the "
                            "unfinished folder and run the same command again"
                        )
                    count += 1
    return count


def _checksum_on_disk(read: Callable[[str], Tensor], name: str) -> int:
    return checksum(read(name))


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
