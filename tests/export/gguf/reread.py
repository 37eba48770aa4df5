"""A Transformers model with the weights that are in a GGUF file, dequantized by the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.export.gguf.model import describe
from auto_round.export.gguf.tensors import Change, GgufTensor, Piece
from auto_round.models.folder import FolderSource


def reread(model: Path, file: Path) -> Any:
    """The model of a folder in float32, evaluation mode, every weight replaced by the file's.

    Args:
        model: the folder that the file was made from.
        file: GGUF file of a family in the table.
    """
    import gguf
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    there = {t.name: t for t in gguf.GGUFReader(file).tensors}
    found: dict[str, Tensor] = {}
    with FolderSource.open(model) as source:
        described = describe(source, AutoTokenizer.from_pretrained(model), "x")
        for tensor in described.tensors:
            stored = there[tensor.name]
            rows = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
            rows = rows.reshape(-1, tensor.shape[-1])
            for piece in tensor.pieces:
                found[piece.source] = undo(tensor, piece, rows)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.save_pretrained(file.parent.parent / "reread")
    path = file.parent.parent / "reread" / "model.safetensors"
    state = load_file(path)
    assert found.keys() == state.keys()
    save_file({n: found[n].contiguous() for n in state}, path, {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32).eval()


def undo(tensor: GgufTensor, piece: Piece, rows: Tensor) -> Tensor:
    """The source's tensor from the rows of the file."""
    part = rows[0] if len(tensor.shape) == 1 else rows[piece.start : piece.start + piece.rows]
    if piece.order is not None:
        back = torch.empty_like(part)
        back[piece.order.indices(len(part))] = part
        part = back
    if tensor.change is Change.PLUS_ONE:
        part = part - 1
    return part.T if tensor.change is Change.TRANSPOSED else part
