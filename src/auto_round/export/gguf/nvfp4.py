"""NVFP4 in GGUF files: the number that the blocks of a matrix are multiplied by is a tensor of its own.

`blk.0.attn_q.weight` has `blk.0.attn_q.scale` `[1]` float32 beside it, stacked experts one number each.
llama.cpp loads these tensors for every architecture and multiplies by them in the graphs of some only; with
another one the numbers would be left out without an error.

Source: llama.cpp `llama_model_base::load_tensors` of `src/llama-model.cpp`, `build_ffn`, `build_moe_ffn`,
`build_qkv`, `build_attn` of `src/llama-graph.cpp`, and their callers in `src/models`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from auto_round.errors import Refusal, UnsupportedError
from auto_round.export.gguf.tensors import Change, GgufTensor, TensorRows
from auto_round.facts.tensor import MATRIX

KIND = "nvfp4"
MULTIPLIED = ("llama", "qwen3", "qwen3moe")
"""Architectures whose graphs multiply by the numbers of attention, feed-forward layers and experts. Granite's
does too, and predicts NaN (llama-cpp-python 0.3.36)."""

_WEIGHT, _SCALE, _BIAS = ".weight", ".scale", ".bias"
_INSTEAD = "q8_0"


def refuse_unmultiplied(arch: str) -> None:
    """Refuse NVFP4 for an architecture whose graph leaves the numbers out.

    Raises:
        UnsupportedError: it does; names those that do not.
    """
    if arch not in MULTIPLIED:
        reason = f'llama.cpp leaves out the numbers over the blocks of NVFP4 for the architecture "{arch}"'
        remedy = f"use gguf:mxfp4 or gguf:q4_k_m; NVFP4 is for {', '.join(MULTIPLIED)}"
        raise UnsupportedError("the file cannot be written", [Refusal("gguf:nvfp4", reason, remedy)])


def type_with_number(tensor: GgufTensor, kind: str, names: Collection[str]) -> str:
    """The type, or another one where NVFP4 has no place for its number.

    Matrices put together from several have one number for all, and llama.cpp stops where the number of a
    feed-forward layer would be multiplied after a bias was added.

    Args:
        tensor: a tensor of the file.
        kind: type that the mixture gives it.
        names: of all tensors.
    """
    if kind != KIND:
        return kind
    matrices = 1 if len(tensor.shape) == MATRIX else tensor.shape[0]
    biased = ".ffn_" in tensor.name and tensor.name.replace(_WEIGHT, _BIAS) in names
    whole = all(piece.rows * matrices == tensor.rows for piece in tensor.pieces)
    whole &= len(tensor.pieces) == matrices and tensor.change is Change.NONE
    return kind if whole and tensor.name.startswith("blk.") and not biased else _INSTEAD


def scale_name(name: str) -> str:
    """Name of the tensor with the numbers of another one."""
    return name.removesuffix(_WEIGHT) + _SCALE


def scale_of(tensor: GgufTensor) -> GgufTensor:
    """The tensor with the numbers of another one."""
    pieces = tuple(TensorRows(piece.source, i, 1) for i, piece in enumerate(tensor.pieces))
    return GgufTensor(scale_name(tensor.name), (len(pieces),), pieces, Change.SCALE)


def number_of(scales: Mapping[str, Tensor], tensor: GgufTensor, piece: TensorRows) -> Tensor:
    """The number of the matrix that a piece is, `[1]` float32; 1 where the file has none.

    Args:
        scales: name of a tensor -> its numbers, for those that have some.
        tensor: a tensor of the file.
        piece: one of its pieces.
    """
    found = scales.get(tensor.name)
    if found is None:
        return torch.ones(1, dtype=torch.float32, device="cpu")
    return found[piece.start * len(found) // tensor.rows].reshape(1)
