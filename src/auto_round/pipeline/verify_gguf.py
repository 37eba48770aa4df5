"""Verification of a GGUF file by readers that are not ours: the `gguf` package, and llama.cpp itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import CheckpointError
from auto_round.evaluate.logits import Comparison
from auto_round.export.gguf.exporter import GgufExporter
from auto_round.export.gguf.library import gguf
from auto_round.export.gguf.tensors import GgufTensor
from auto_round.pipeline.job import Job
from auto_round.pipeline.measure import Measured

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
    "q3_k": 0.7,
    "q2_k": 1.0,
}
"""Root mean square error of a tensor against its source, as a share of the source's root mean square: about
three times what rounding gives, less than the 1.4 of rows in a wrong order."""

TOKENS = 128
"""Tokens that llama.cpp is asked about."""


def verify_gguf(job: Job, exporter: GgufExporter, folder: Path, measured: Measured | None) -> dict[str, Any]:
    """Read a file back and compare it with the source; what was found.

    The `gguf` package reads every tensor's name, shape and type, and dequantizes some rows of each. Where
    `llama_cpp` is installed, llama.cpp itself predicts the held-out text too.

    Raises:
        CheckpointError: a tensor is not what it should be.
    """
    found: dict[str, Any] = {"file": exporter.file, "reader": "gguf", **_tensors(job, exporter, folder)}
    if measured is not None and job.rows is not None and importlib.util.find_spec("llama_cpp") is not None:
        found |= {"reader": "llama.cpp", **_predictions(job, folder / exporter.file, measured)}
    return found


def _tensors(job: Job, exporter: GgufExporter, folder: Path) -> dict[str, Any]:
    path = folder / exporter.file
    read = {tensor.name: tensor for tensor in gguf().GGUFReader(path).tensors}
    worst, where = 0.0, ""
    for wanted in exporter.model.tensors:
        kind = exporter.types[wanted.name]
        there = read.get(wanted.name)
        if there is None:
            raise CheckpointError(f"{path}: tensor {wanted.name} is not in it")
        shape = tuple(int(n) for n in reversed(there.shape))
        if there.tensor_type.name.lower() != kind or shape != wanted.shape:
            raise CheckpointError(
                f"{path}: tensor {wanted.name} is {there.tensor_type.name} {list(shape)}, expected "
                f"{kind.upper()} {list(wanted.shape)}"
            )
        error = _error(job, exporter, wanted, there)
        if not error <= LARGEST_ERROR[kind]:
            raise CheckpointError(
                f"{path}: tensor {wanted.name} ({kind.upper()}) differs from its source by {error:.2g} of "
                f"its size, at most {LARGEST_ERROR[kind]} was expected. Please report this; the unfinished "
                "folder is kept"
            )
        if error / LARGEST_ERROR[kind] > worst:
            worst, where = error / LARGEST_ERROR[kind], f"{wanted.name}: {error:.4f}"
    return {"tensors": len(read), "largest_error": where}


def _error(job: Job, exporter: GgufExporter, wanted: GgufTensor, there: Any) -> float:
    """Error of the first rows of the first piece, as a share of their size."""
    retrained = exporter.types[wanted.name] == "f32" and job.tune.tune_norm_bias
    if not wanted.pieces or retrained:
        return 0.0
    piece = wanted.pieces[0]
    source = wanted.prepare(piece, job.source.read_tensor(piece.source)).float()
    source = source.reshape(-1, wanted.shape[-1])[:ROWS]
    data = there.data.reshape(-1, there.data.shape[-1])[piece.start : piece.start + len(source)]
    numbers = gguf().quants.dequantize(data, there.tensor_type)
    stored = torch.tensor(numbers, dtype=torch.float32, device="cpu").reshape(source.shape)
    size = source.square().mean().sqrt()
    if not bool(size > 0):
        return float(stored.abs().max())
    return float((stored - source).square().mean().sqrt() / size)


def _predictions(job: Job, path: Path, measured: Measured) -> dict[str, Any]:
    """What llama.cpp predicts for the beginning of a held-out row, against the tuned model.

    llama.cpp rounds activations to 8 bits and reads the rounded embedding, so the two are not equal: the
    figures are for people.
    """
    import llama_cpp
    import numpy as np

    rows = () if job.rows is None else job.rows.rows[job.tuned :]
    ids = rows[0].input_ids[:TOKENS].tolist()
    model = llama_cpp.Llama(str(path), n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False)
    model.eval(ids)
    theirs = torch.from_numpy(np.array(model.scores[: len(ids) - 1], dtype=np.float32))
    ours = _ours(job, measured, len(ids) - 1)
    comparison = Comparison()
    comparison.add(ours.cpu().float(), theirs, torch.tensor(ids[1:], dtype=torch.int64, device="cpu"), None)
    return {
        "kl": comparison.kl,
        "perplexity": comparison.perplexity,
        "perplexity_tuned": comparison.perplexity_reference,
        "same_top_token": comparison.agreement,
    }


def _ours(job: Job, measured: Measured, length: int) -> Tensor:
    with job.source.stem(job.device, job.dtype) as stem:
        hidden = measured.final_hidden[:1, :length].to(job.device)
        return stem.finish(hidden, measured.head)[0]
