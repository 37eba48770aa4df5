"""The other packages' Pythons, and asking one of them what it makes of a folder."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

DRIVERS = Path(__file__).parent / "drivers"
SECONDS = 7200
"""A driver that takes longer hangs."""


@dataclass(frozen=True)
class Peer:
    """Another package in an environment of its own.

    Attributes:
        variable: environment variable that names the Python of that environment.
        needs: what has to be installed there.
    """

    variable: str
    needs: str

    def python(self) -> str:
        """The Python; skips the test when none is named."""
        found = os.environ.get(self.variable)
        if not found:
            pytest.skip(f"{self.variable} names no Python with {self.needs} (see tests/peer/README.md)")
        return found

    def has(self, module: str) -> bool:
        """Whether a module can be imported there."""
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return subprocess.run([self.python(), "-c", code], env=_clean(), check=False).returncode == 0

    def run(self, driver: str, request: dict[str, Any], scratch: Path) -> None:
        """Run a driver there; it must not see the package under test.

        Raises:
            AssertionError: the driver did not end well, with the end of what it said.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        path = scratch / "request.json"
        path.write_text(json.dumps(request))
        done = subprocess.run(
            [self.python(), str(DRIVERS / driver), str(path)],
            env=_clean(),
            cwd=scratch,
            timeout=SECONDS,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{driver} under {self.variable}:\n{(done.stdout + done.stderr)[-4000:]}"


def _clean() -> dict[str, str]:
    """The environment without what would show a peer the package under test."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


AUTO_ROUND = Peer("PEER_AUTO_ROUND", "auto-round 0.16.1")
GPTQMODEL = Peer("PEER_GPTQMODEL", "gptqmodel")
LLM_COMPRESSOR = Peer("PEER_LLM_COMPRESSOR", "llmcompressor")
COMPRESSED_TENSORS = Peer("PEER_COMPRESSED_TENSORS", "transformers and compressed-tensors")


@dataclass(frozen=True)
class Question:
    """One folder for a peer to load.

    Attributes:
        folder: what to load.
        layers: names of the layers whose weights are asked for -> `[out, in]`.
        dtype: dtype to compute in; a peer that refuses it says in its answer which it took.
        backend: the peer's name of a kernel.
    """

    folder: Path
    layers: dict[str, list[int]]
    dtype: str = "float16"
    backend: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a peer made of a folder.

    Attributes:
        error: why it could not be loaded or run.
        dtype: dtype of its computation.
        modules: layer -> class that ran it.
        logits: `[1, tokens, vocabulary]` float32.
        generated: tokens of a greedy continuation.
        weights: layer -> `[out, in]` float32.
        biases: layer -> `[out]` float32, where there is one.
    """

    error: str | None = None
    dtype: str = ""
    modules: dict[str, str] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    generated: Tensor = field(default_factory=lambda: torch.empty(0))
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


def ask(
    peer: Peer, driver: str, ids: list[int], new_tokens: int, questions: dict[str, Question], scratch: Path
) -> dict[str, Answer]:
    """Ask all questions in one process, since importing a peer takes longer than answering."""
    jobs = [
        {
            "folder": str(q.folder),
            "layers": q.layers,
            "dtype": q.dtype,
            "backend": q.backend,
            "out": str(scratch / f"{name}.safetensors"),
        }
        for name, q in questions.items()
    ]
    peer.run(driver, {"ids": ids, "new_tokens": new_tokens, "jobs": jobs}, scratch)
    return {name: _answer(scratch / f"{name}.safetensors") for name in questions}


def _answer(path: Path) -> Answer:
    facts = json.loads(path.with_suffix(".json").read_text())
    if "error" in facts:
        return Answer(error=facts["error"])
    tensors = load_file(path)
    weights, biases = (
        {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
        for kind in ("weight.", "bias.")
    )
    return Answer(
        None, facts["dtype"], facts["modules"], tensors["logits"], tensors["generated"], weights, biases
    )
