"""Small checkpoints, written by the reference implementation or by ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from auto_round.checkpoint.header import Spec


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Any bits of the dtype (bools: 0 or 1)."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    top = 2 if dtype is torch.bool else 256
    data = torch.randint(0, top, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def raw(tensor: Tensor) -> bytes:
    """Bytes of a tensor, so that NaNs compare."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Manifest of given tensors."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_sharded(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Shards and index by the reference implementation."""
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
