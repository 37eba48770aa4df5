"""GGUF files run by llama.cpp itself: its kernels, which round activations to 8 bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import CheckpointError, ConfigError

PACKAGE = "llama-cpp-python"
_SHORTEST = 64
"""Tokens of the smallest context that is asked for."""


def check_installed() -> None:
    """Refuse when the package is missing.

    Raises:
        ConfigError: it is.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConfigError(f"llama.cpp runs GGUF files through a package: pip install {PACKAGE}")


class LlamaCppPredictor:
    """A GGUF file in llama.cpp.

    Args:
        file: the file.
        length: most tokens of a row.
        threads: of the processor.

    Raises:
        CheckpointError: llama.cpp does not load it.
    """

    def __init__(self, file: Path, length: int, threads: int) -> None:
        from llama_cpp import Llama

        sizes = {"n_ctx": max(_SHORTEST, length), "n_batch": length, "n_ubatch": length}
        try:
            self._model: Any = Llama(
                str(file), logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads, **sizes
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file}: llama.cpp does not load it: {error}") from error

    def logits(self, rows: Tensor) -> Tensor:
        """See `predictors.Predictor`."""
        found = []
        for row in rows.tolist():
            self._model.reset()
            self._model.eval(row)
            found.append(torch.from_numpy(self._model.scores[: len(row) - 1].copy()))
        return torch.stack(found)
