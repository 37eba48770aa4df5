"""Tensors saved between two blocks so that a killed run can continue."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from auto_round.checkpoint.disk import bytes_of, open_file, read_at, reading, replacing, write_at
from auto_round.checkpoint.header import build_header, read_header
from auto_round.errors import CheckpointError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, durable: bool = True) -> None:
    """Write one safetensors file, whole or not at all; an older one is replaced.

    No second copy of contiguous CPU tensors is made in memory.

    Args:
        path: the file.
        tensors: by name.
        durable: return when it would survive a power cut.

    Raises:
        ConfigError: disk full, no permission.
    """
    head, begins = build_header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    with replacing(path, durable=durable) as fd:
        write_at(fd, head, 0)
        for name, tensor in tensors.items():
            write_at(fd, bytes_of(tensor.detach().cpu().contiguous()), begins[name])


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, into fresh memory, in the order of the bytes.

    Raises:
        CheckpointError: missing, truncated or corrupt.
    """
    tensors: dict[str, Tensor] = {}
    with reading(path):
        fd = open_file(path, os.O_RDONLY)
        try:
            for name, info in read_header(fd, path).items():
                tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
                if read_at(fd, bytes_of(tensor), info.begin) != info.nbytes:
                    raise CheckpointError(f'{path}: ends inside tensor "{name}" at offset {info.begin}')
                tensors[name] = tensor
        finally:
            os.close(fd)
    return tensors
