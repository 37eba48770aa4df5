"""Tensors of a checkpoint as a GGUF file has them, dequantized by the `gguf` package: the export, undone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from auto_round.errors import CheckpointError
from auto_round.export.gguf.library import gguf
from auto_round.export.gguf.model import describe_gguf
from auto_round.export.gguf.nvfp4 import KIND, number_of, scale_name
from auto_round.models.folder import FolderSource


def gguf_weights(model: Path, file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the checkpoint, name and float32 value.

    Args:
        model: the folder that the file was made from.
        file: GGUF file of a family in the table.

    Raises:
        UnsupportedError: a family that is not in the table.
        CheckpointError: a tensor is missing or has another shape: the file is of another model.
    """
    from transformers import AutoTokenizer

    library = gguf()
    there = {t.name: t for t in library.GGUFReader(file).tensors}
    scales = {
        name: torch.tensor(there[scale_name(name)].data, dtype=torch.float32, device="cpu")
        for name, t in there.items()
        if t.tensor_type.name.lower() == KIND and scale_name(name) in there
    }
    with FolderSource.open(model) as source:
        for tensor in describe_gguf(source, AutoTokenizer.from_pretrained(model), "x").tensors:
            stored = there.get(tensor.name)
            shape = None if stored is None else tuple(reversed(stored.shape.tolist()))
            if stored is None or shape != tuple(tensor.shape):
                found = "is missing" if stored is None else f"is {shape}"
                raise CheckpointError(
                    f"{file}: tensor {tensor.name} {found}; made of {model} it would be "
                    f"{tuple(tensor.shape)}: the file belongs to another model"
                )
            numbers = library.quants.dequantize(stored.data, stored.tensor_type)
            rows = torch.tensor(numbers, dtype=torch.float32, device="cpu").reshape(-1, tensor.shape[-1])
            for piece in tensor.pieces:
                part = rows if len(tensor.shape) == 1 else rows[piece.start : piece.start + piece.rows]
                if tensor.name in scales:
                    part = part * number_of(scales, tensor, piece)
                yield piece.source, tensor.restore(piece, part)
