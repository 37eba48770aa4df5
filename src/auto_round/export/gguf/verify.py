"""Verification of a GGUF file by readers that are not ours: the `gguf` package, and llama.cpp itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import CheckpointError
from auto_round.export.gguf.file import GgufFile
from auto_round.export.gguf.library import gguf
from auto_round.export.gguf.nvfp4 import KIND, scale_name
from auto_round.export.gguf.tensors import Change, GgufTensor
from auto_round.export.verification import WrittenRun
from auto_round.models.source import matrix_reader

ROWS = 64
"""Rows of each tensor that are read back."""

LARGEST_ERROR: Mapping[str, float] = {
    "f32": 1e-6,
    "bf16": 0.01,
    "f16": 0.002,
    "q8_0": 0.03,
    "q6_k": 0.1,
    "q5_k": 0.2,
    "q5_1": 0.2,
    "q5_0": 0.2,
    "q4_k": 0.4,
    "q4_1": 0.4,
    "q4_0": 0.4,
    "mxfp4": 0.5,
    "nvfp4": 0.4,
    "q3_k": 0.7,
    "q2_k": 1.0,
}
"""Root mean square error of a tensor against its source, as a share of the source's root mean square: about
three times what rounding gives, less than the 1.4 of rows in a wrong order."""

TOKENS = 128
"""Tokens that llama.cpp is asked about."""


def verify_gguf(file: GgufFile, folder: Path, run: WrittenRun) -> dict[str, Any]:
    """Read a file back and compare it with the source; what was found.

    The `gguf` package reads every tensor's name, shape and type, and dequantizes some rows of each. Where
    `llama_cpp` is installed, llama.cpp itself predicts the held-out text too.

    Raises:
        CheckpointError: a tensor is not what it should be.
    """
    found: dict[str, Any] = {"file": file.name, "reader": "gguf", **_tensors(file, folder, run)}
    ids = run.held_out(TOKENS)
    if ids is not None and importlib.util.find_spec("llama_cpp") is not None:
        found |= {"reader": "llama.cpp", **run.compare(ids, _predictions(folder / file.name, ids))}
    return found


def _tensors(file: GgufFile, folder: Path, run: WrittenRun) -> dict[str, Any]:
    path = folder / file.name
    read = {tensor.name: tensor for tensor in gguf().GGUFReader(path).tensors}
    original = matrix_reader(run.source)
    worst, where = 0.0, ""
    for wanted in file.tensors:
        kind = file.types[wanted.name]
        there = read.get(wanted.name)
        if there is None:
            raise CheckpointError(f"{path}: tensor {wanted.name} is not in it")
        shape = tuple(int(n) for n in reversed(there.shape))
        if there.tensor_type.name.lower() != kind or shape != wanted.shape:
            raise CheckpointError(
                f"{path}: tensor {wanted.name} is {there.tensor_type.name} {list(shape)}, expected "
                f"{kind.upper()} {list(wanted.shape)}"
            )
        error = 0.0 if _incomparable(run, file, wanted) else _error(file, wanted, read, original)
        if not error <= LARGEST_ERROR[kind]:
            raise CheckpointError(
                f"{path}: tensor {wanted.name} ({kind.upper()}) differs from its source by {error:.2g} of "
                f"its size, at most {LARGEST_ERROR[kind]} was expected. Please report this; the unfinished "
                "folder is kept"
            )
        if error / LARGEST_ERROR[kind] > worst:
            worst, where = error / LARGEST_ERROR[kind], f"{wanted.name}: {error:.4f}"
    return {"tensors": len(read), "largest_error": where}


def _incomparable(run: WrittenRun, file: GgufFile, wanted: GgufTensor) -> bool:
    """Whether a tensor is not the source's, rounded: it comes from elsewhere, or was tuned."""
    retrained = file.types[wanted.name] == "f32" and run.norms_tuned
    return not wanted.pieces or retrained or wanted.change is Change.SCALE


def _error(
    file: GgufFile, wanted: GgufTensor, read: Mapping[str, Any], original: Callable[[str], Tensor]
) -> float:
    """Error of the first rows of the first piece, as a share of their size."""
    piece, there = wanted.pieces[0], read[wanted.name]
    source = wanted.prepare(piece, original(piece.source)).float()
    source = source.reshape(-1, wanted.shape[-1])[:ROWS]
    data = there.data.reshape(-1, there.data.shape[-1])[piece.start : piece.start + len(source)]
    numbers = gguf().quants.dequantize(data, there.tensor_type)
    if file.types[wanted.name] == KIND:
        numbers = numbers * read[scale_name(wanted.name)].data[0]
    stored = torch.tensor(numbers, dtype=torch.float32, device="cpu").reshape(source.shape)
    size = source.square().mean().sqrt()
    if not bool(size > 0):
        return float(stored.abs().max())
    return float((stored - source).square().mean().sqrt() / size)


def _predictions(path: Path, ids: Tensor) -> Tensor:
    """What llama.cpp predicts after each token but the last, `[tokens - 1, vocabulary]` float32.

    llama.cpp rounds activations to 8 bits and uses the rounded embedding, so its predictions are not exactly
    those of the tuned model: the figures are for people, and nothing is refused by them.
    """
    import llama_cpp
    import numpy as np

    tokens = ids.tolist()
    model = llama_cpp.Llama(str(path), n_ctx=len(tokens), n_batch=len(tokens), logits_all=True, verbose=False)
    model.eval(tokens)
    return torch.from_numpy(np.array(model.scores[: len(tokens) - 1], dtype=np.float32))
