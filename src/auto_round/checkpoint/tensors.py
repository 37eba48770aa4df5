"""Named tensors that can be read one by one, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from auto_round.facts.layer import Layer
from auto_round.facts.tensor import TensorSpec


class Tensors(Protocol):
    """The tensors of a model's folder; nothing is kept in memory.

    All methods may be called from several threads.
    """

    @property
    def folder(self) -> Path:
        """The folder."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in the order of their bytes."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor; no weight is read.

        Raises:
            CheckpointError: no such tensor.
        """
        ...

    def read(self, name: str) -> Tensor:
        """Tensor in fresh CPU memory that the caller owns.

        Raises:
            CheckpointError: no such tensor, or its file is damaged.
        """
        ...

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same in another dtype; a large one never lies in memory twice.

        Raises:
            CheckpointError: no such tensor, or its file is damaged.
        """
        ...

    def read_entry(self, name: str, index: int) -> Tensor:
        """One entry of a tensor's first axis, in fresh CPU memory that the caller owns.

        Raises:
            CheckpointError: no such tensor, or its file is damaged.
        """
        ...

    def copy_into(self, name: str, fd: int, offset: int) -> None:
        """Write the bytes of a tensor to an open file.

        Raises:
            CheckpointError: no such tensor, or its file is damaged.
            OSError: the target cannot be written.
        """
        ...

    def fingerprint(self) -> str:
        """Hash that tells two models apart without reading them whole."""
        ...

    def close(self) -> None:
        """Close all files; reading afterwards is an error."""
        ...


def read_matrix(
    layer: Layer, read: Callable[[str], Tensor], read_entry: Callable[[str, int], Tensor]
) -> Tensor:
    """Weight of a layer, `[out, in]`.

    Args:
        layer: the layer.
        read: as in `Tensors`.
        read_entry: as in `Tensors`.
    """
    if not layer.fused or layer.expert is None:
        weight = read(layer.tensor)
        return weight.t().contiguous() if layer.transposed else weight
    return matrix_of(layer, read_entry(layer.tensor, layer.expert)).contiguous()


def matrix_of(layer: Layer, entry: Tensor) -> Tensor:
    """A view of a fused layer's matrix, `[out, in]`, in its expert's entry of the tensor on disk."""
    weight = entry.t() if layer.transposed else entry
    return weight if layer.rows is None else weight[slice(*layer.rows)]
