"""What tells one model from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from auto_round.checkpoint.tensors import Tensors
from auto_round.facts.tensor import TensorSpec
from auto_round.models.source import ModelSource


def model_fingerprint(source: ModelSource) -> str:
    """SHA-256 over names, shapes, the configuration and samples of each weight."""
    if source.files is not None:
        return files_fingerprint(source.files)
    digest = hashlib.sha256(_listed(source.tensors))
    for layer in source.layers:
        digest.update(source.read(layer).reshape(-1)[:64].double().numpy().tobytes())
    return digest.hexdigest()


def files_fingerprint(files: Tensors) -> str:
    """The same of a model's folder, for which no model need be built."""
    digest = hashlib.sha256(_listed({name: files.spec(name) for name in files.names}))
    digest.update(files.fingerprint().encode())
    digest.update((files.folder / "config.json").read_bytes())
    return digest.hexdigest()


def _listed(tensors: Mapping[str, TensorSpec]) -> bytes:
    lines = (f"{name} {spec.dtype} {tuple(spec.shape)}\n" for name, spec in tensors.items())
    return "".join(lines).encode()
