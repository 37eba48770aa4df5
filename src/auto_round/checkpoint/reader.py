"""Checkpoint folder read by byte range: no memory map, no pickle, every bound checked on opening."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from auto_round.checkpoint.disk import bytes_of, copy_at, read_at, reading
from auto_round.checkpoint.header import TensorInfo
from auto_round.checkpoint.open_files import OpenFiles
from auto_round.checkpoint.shards import (
    DIFFUSERS,
    INDEX_FILE,
    SINGLE_FILE,
    TRANSFORMERS,
    read_file,
    read_shards,
)
from auto_round.errors import CheckpointError, ConfigError, InternalError, MissingError, nearest
from auto_round.facts.tensor import TensorSpec

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SAMPLE_BYTES = 4096
_PIECE_BYTES = 16 << 20


class Checkpoint:
    """Tensors of a folder of safetensors files.

    Reads go through `pread` into fresh memory, so that resident memory holds what is asked for and nothing
    else. All methods may be called from several threads. Use as a context manager, or call `close`.

    Attributes:
        folder: the folder.
        mistakes: what the index says that the shards do not bear out, for people; none of it does harm.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo], mistakes: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.mistakes = mistakes
        self._tensors = tensors
        self._files = OpenFiles(os.O_RDONLY)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read and check the headers of every shard; no weight is read.

        Raises:
            ConfigError: no such folder, no safetensors in it, or pickled weights only.
            CheckpointError: a shard is missing, truncated or contradicts itself or the index.
        """
        path = Path(folder)
        with reading(path):
            if not path.is_dir():
                raise MissingError(f"{path} is not a folder: expected one with config.json and {SINGLE_FILE}")
            held = {file.name for file in path.iterdir()}
        for names in (TRANSFORMERS, DIFFUSERS):
            if names.single in held:  # before an index, as in both libraries
                return cls(path, read_file(path / names.single))
            if names.index in held:
                return cls(path, *read_shards(path, names.index))
        raise ConfigError(_nothing_to_read(path, sorted(held)))

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in the order of their bytes, shard by shard."""
        return tuple(self._tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        """Weight files, in order."""
        return tuple(dict.fromkeys(info.file for info in self._tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self._tensors.values())

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            CheckpointError: no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            hint = nearest(name, self._tensors)
            raise CheckpointError(
                f'{self.folder}: no tensor "{name}" in its safetensors files; {hint}'
            ) from None

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor.

        Raises:
            CheckpointError: no such tensor.
        """
        info = self.info(name)
        return TensorSpec(info.dtype, tuple(info.shape))

    def read(self, name: str) -> Tensor:
        """Tensor in fresh CPU memory that the caller owns.

        Raises:
            CheckpointError: no such tensor, or its file ends early.
        """
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        return self._fill(name, info, tensor, info.begin)

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same in another dtype, converted a few rows at a time where it is large.

        Raises:
            CheckpointError: no such tensor, or its file ends early.
        """
        info = self.info(name)
        if info.dtype == dtype or info.nbytes <= _PIECE_BYTES or not info.shape:
            return self.read(name).to(dtype)
        out = torch.empty(info.shape, dtype=dtype, device="cpu")
        step = max(1, _PIECE_BYTES * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], step):
            stop = min(start + step, info.shape[0])
            out[start:stop] = self.read_rows(name, start, stop)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (excluded) of the first axis, without reading the others.

        Raises:
            CheckpointError: no such tensor, or its file ends early.
            InternalError: the tensor has no such rows.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise InternalError(f'rows {start} to {stop} of tensor "{name}" of shape {list(info.shape)}')
        row_bytes = info.nbytes // max(info.shape[0], 1)
        rows = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype, device="cpu")
        return self._fill(name, info, rows, info.begin + start * row_bytes)

    def read_entry(self, name: str, index: int) -> Tensor:
        """One entry of the first axis, without reading the others; raises what `read_rows` raises."""
        return self.read_rows(name, index, index + 1)[0]

    def copy_into(self, name: str, fd: int, offset: int) -> None:
        """Copy the bytes of a tensor to an open file without passing them through Python.

        Raises:
            CheckpointError: no such tensor, or its file ends early.
            OSError: the target cannot be written.
        """
        info = self.info(name)
        with self._opened(info.file) as source:
            done = copy_at(source, info.begin, fd, offset, info.nbytes)
        if done != info.nbytes:
            raise _cut_short(name, info, info.begin + done)

    def fingerprint(self) -> str:
        """Hash of every tensor's name, dtype and shape, and of up to 12 KiB of its bytes.

        Tells two models apart without reading them whole: first, middle and last 4 KiB of each tensor count.
        """
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            info = self._tensors[name]
            digest.update(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode())
            digest.update(self._sample(name, info))
        return digest.hexdigest()

    def close(self) -> None:
        """Close all files; reading afterwards is an error."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _opened(self, file: Path) -> Iterator[int]:
        """Descriptor of a shard while the context lasts."""
        with ExitStack() as stack:
            with reading(file):
                fd = stack.enter_context(self._files.use(file))
            yield fd

    def _fill(self, name: str, info: TensorInfo, out: Tensor, offset: int) -> Tensor:
        """Fill `out` from the file of a tensor, starting at `offset`."""
        view = bytes_of(out)
        with self._opened(info.file) as fd, reading(info.file):
            done = read_at(fd, view, offset)
        if done != len(view):
            raise _cut_short(name, info, offset + done)
        return out

    def _sample(self, name: str, info: TensorInfo) -> bytes:
        """First, middle and last bytes of a tensor; all of them when it is small."""
        if info.nbytes <= 3 * _SAMPLE_BYTES:
            spans = [(info.begin, info.nbytes)]
        else:
            middle = info.begin + (info.nbytes - _SAMPLE_BYTES) // 2
            spans = [(start, _SAMPLE_BYTES) for start in (info.begin, middle, info.end - _SAMPLE_BYTES)]
        sample = bytearray(sum(count for _, count in spans))
        view = memoryview(sample)
        with self._opened(info.file) as fd:
            for start, count in spans:
                with reading(info.file):
                    done = read_at(fd, view[:count], start)
                if done != count:
                    raise _cut_short(name, info, start + done)
                view = view[count:]
        return bytes(sample)


def _cut_short(name: str, info: TensorInfo, offset: int) -> CheckpointError:
    """Error for a file that has become shorter than its header says."""
    return CheckpointError(
        f'{info.file}: ends at offset {offset} inside tensor "{name}", '
        f"which takes bytes {info.begin} to {info.end}: the file changed while it was read"
    )


def _nothing_to_read(folder: Path, held: Sequence[str]) -> str:
    """What to say of a folder without safetensors that holds these files."""
    pickles = [name for name in held if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{folder} holds pickled weights only ({pickles[0]}), which are refused because loading a pickle "
            "can run any code: convert them once, in a place where that does no harm, with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new), and pass the new folder"
        )
    others = [name for name in held if name.endswith(".safetensors")]
    found = f"; it has {', '.join(others[:3])}, which are not what Transformers loads" if others else ""
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}"
