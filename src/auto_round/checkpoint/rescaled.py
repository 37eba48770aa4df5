"""The tensors of a folder, some of them rescaled as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from auto_round.checkpoint.disk import bytes_of, write_at
from auto_round.checkpoint.tensors import Tensors
from auto_round.facts.tensor import TensorSpec
from auto_round.numerics.smoothing import Rescaling


class RescaledTensors:
    """`Tensors` over others; names, shapes and dtypes are theirs."""

    def __init__(self, files: Tensors, changes: Mapping[str, Rescaling]) -> None:
        self._files, self._changes = files, changes

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._files.folder

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in the order of their bytes."""
        return self._files.names

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self._files.spec(name)

    def read(self, name: str) -> Tensor:
        """A tensor in fresh memory."""
        tensor = self._files.read(name)
        change = self._changes.get(name)
        return tensor if change is None else change.of(tensor)

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same in another dtype, from its value in its own: all who read it see one value."""
        return self.read(name).to(dtype) if name in self._changes else self._files.read_as(name, dtype)

    def read_entry(self, name: str, index: int) -> Tensor:
        """One entry of a tensor's first axis, in fresh memory."""
        return (
            self.read(name)[index].clone() if name in self._changes else self._files.read_entry(name, index)
        )

    def copy_into(self, name: str, fd: int, offset: int) -> None:
        """Write the bytes of a tensor to an open file."""
        if name in self._changes:
            write_at(fd, bytes_of(self.read(name).contiguous()), offset)
        else:
            self._files.copy_into(name, fd, offset)

    def fingerprint(self) -> str:
        """That of the folder."""
        return self._files.fingerprint()

    def close(self) -> None:
        """Close all files."""
        self._files.close()
