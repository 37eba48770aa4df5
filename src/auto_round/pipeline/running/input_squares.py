"""Mean squares of layers' inputs, kept in files until the run ends, so that a killed run can continue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from auto_round.checkpoint.blobs import load_tensors, save_tensors

_MEAN, _TOKENS = ":mean", ":tokens"


class InputSquares(NamedTuple):
    """Mean square of what flowed into one matrix.

    Attributes:
        mean: of each input channel, `[in]` float32.
        tokens: number of tokens that the mean is over.
    """

    mean: Tensor
    tokens: int


def save_inputs(scratch: Path, unit: str, found: Mapping[str, InputSquares]) -> None:
    """Write what one unit of work measured, complete and durable or not at all; an older file is replaced.

    Args:
        scratch: folder of the run.
        unit: word for the file's name.
        found: name of a tensor in the source -> its inputs.
    """
    tensors: dict[str, Tensor] = {}
    for name, (mean, tokens) in found.items():
        tensors[name + _MEAN] = mean
        tensors[name + _TOKENS] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
    save_tensors(_path(scratch, unit), tensors)


def load_inputs(scratch: Path) -> dict[str, InputSquares]:
    """Everything that was kept, by name of a tensor in the source.

    Raises:
        CheckpointError: a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(scratch.glob(_path(scratch, "*").name)):
        tensors |= load_tensors(path)
    names = [name.removesuffix(_MEAN) for name in tensors if name.endswith(_MEAN)]
    return {name: InputSquares(tensors[name + _MEAN], int(tensors[name + _TOKENS])) for name in names}


def _path(scratch: Path, unit: str) -> Path:
    return scratch / f"inputs-{unit}.safetensors"
