"""A quantized folder as if it held plain weights: every matrix is unpacked when it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.disk import bytes_of, write_at
from auto_round.checkpoint.header import read_object
from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.tensors import Tensors
from auto_round.facts.tensor import TensorSpec
from auto_round.log import logger
from auto_round.stored.configuration import dtype_of, is_plain, quantization_of
from auto_round.stored.methods import understand
from auto_round.stored.packed import StoredWeight

_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which AutoGPTQ and AutoAWQ said what `config.json` says now, and what they mean."""
_WORDS = ".qweight"


class Unpacked:
    """The tensors of a plain model over a folder that holds some of them packed.

    Names are those of the plain model, file by file in the order in which safetensors would write it. Only
    what is asked for is read, so that memory holds one matrix, as with a plain folder.

    Attributes:
        files: the folder as it is.
    """

    def __init__(
        self, files: Checkpoint, packed: Sequence[StoredWeight], spare: Collection[str], dtype: torch.dtype
    ) -> None:
        self.files = files
        self._dtype = dtype
        self._packed = {each.tensor: each for each in packed}
        home = {name: each.tensor for each in packed for name in each.tensors}
        place = {file: i for i, file in enumerate(files.files)}
        first: dict[str, int] = {}
        for name in files.names:
            if name not in spare:
                first.setdefault(home.get(name, name), place[files.info(name).file])
        self._names = tuple(sorted(first, key=lambda n: (first[n], -self.spec(n).dtype.itemsize, n)))

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.files.folder

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names of the plain model."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a plain tensor."""
        packed = self._packed.get(name)
        return self.files.spec(name) if packed is None else TensorSpec(self._dtype, packed.plain_shape)

    def read(self, name: str) -> Tensor:
        """A plain tensor, in fresh memory."""
        packed = self._packed.get(name)
        return self.files.read(name) if packed is None else packed.plain(self.files, self._dtype)

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same in another dtype."""
        return self.read(name).to(dtype) if name in self._packed else self.files.read_as(name, dtype)

    def read_entry(self, name: str, index: int) -> Tensor:
        """One entry of a plain tensor's first axis, in fresh memory."""
        packed = self._packed.get(name)
        if packed is None:
            return self.files.read_entry(name, index)
        return packed.plain_entry(self.files, index, self._dtype)

    def copy_into(self, name: str, fd: int, offset: int) -> None:
        """Write the bytes of a plain tensor to an open file."""
        if name not in self._packed:
            self.files.copy_into(name, fd, offset)
        else:
            write_at(fd, bytes_of(self.read(name)), offset)

    def fingerprint(self) -> str:
        """That of the folder."""
        return self.files.fingerprint()

    def close(self) -> None:
        """Close all files."""
        self.files.close()


def open_plain(files: Checkpoint, config: Mapping[str, Any]) -> Tensors:
    """The folder itself, or where it is quantized its tensors as if it were not.

    Args:
        files: the opened folder.
        config: its `config.json`.

    Raises:
        ConfigError: a quantization_config that cannot be.
        UnsupportedError: a way of storing weights that this version does not read; names it.
        CheckpointError: tensors that contradict the configuration.
    """
    said = quantization_of(config) or _older(files)
    if said is None:
        return files
    logger.warning(
        "%s is quantized already (%s): it is unpacked while it is read. Rounding twice loses accuracy: start "
        "from the original weights where there are any",
        files.folder,
        said.get("quant_method"),
    )
    packed, spare = understand(said, files)
    home = {name for each in packed for name in each.tensors}
    rest = (files.info(name).dtype for name in files.names if name not in home)
    dtype = dtype_of(config) or next((d for d in rest if is_plain(d)), torch.bfloat16)
    return Unpacked(files, packed, spare, dtype)


def _older(files: Checkpoint) -> Mapping[str, Any] | None:
    """What a folder of packed words says in a file of its own; None where there is none."""
    if not any(name.endswith(_WORDS) for name in files.names):
        return None
    found = ((files.folder / name, method) for name, method in _BESIDE.items())
    return next(({"quant_method": m, **read_object(path)} for path, m in found if path.is_file()), None)
