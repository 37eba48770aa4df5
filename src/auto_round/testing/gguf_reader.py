"""Tensors of a checkpoint as a GGUF file has them, dequantized by the `gguf` package: the export, undone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from auto_round.export.gguf.model import describe_gguf
from auto_round.export.gguf.tensors import Change, GgufTensor, Piece
from auto_round.models.folder import FolderSource


def read_gguf(model: Path, file: Path) -> dict[str, Tensor]:
    """Tensors of the checkpoint by name, float32.

    Args:
        model: the folder that the file was made from.
        file: GGUF file of a family in the table.
    """
    import gguf
    from transformers import AutoTokenizer

    there = {t.name: t for t in gguf.GGUFReader(file).tensors}
    found: dict[str, Tensor] = {}
    with FolderSource.open(model) as source:
        for tensor in describe_gguf(source, AutoTokenizer.from_pretrained(model), "x").tensors:
            stored = there[tensor.name]
            rows = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
            rows = rows.reshape(-1, tensor.shape[-1])
            for piece in tensor.pieces:
                found[piece.source] = _undo(tensor, piece, rows)
    return found


def _undo(tensor: GgufTensor, piece: Piece, rows: Tensor) -> Tensor:
    """The source's tensor from the rows of the file."""
    part = rows[0] if len(tensor.shape) == 1 else rows[piece.start : piece.start + piece.rows]
    if piece.order is not None:
        back = torch.empty_like(part)
        back[piece.order.indices(len(part))] = part
        part = back
    if tensor.change is Change.PLUS_ONE:
        part = part - 1
    return part.T if tensor.change is Change.TRANSPOSED else part
