"""What tells one model from another."""

from __future__ import annotations

import hashlib

from auto_round.models.source import ModelSource


def model_fingerprint(source: ModelSource) -> str:
    """SHA-256 over names, shapes, the configuration and samples of each weight."""
    digest = hashlib.sha256()
    for name, spec in source.tensors.items():
        digest.update(f"{name} {spec.dtype} {tuple(spec.shape)}\n".encode())
    if source.folder is None or source.files is None:
        for layer in source.layers:
            digest.update(source.read(layer).reshape(-1)[:64].double().numpy().tobytes())
        return digest.hexdigest()
    digest.update(source.files.fingerprint().encode())
    digest.update((source.folder / "config.json").read_bytes())
    return digest.hexdigest()
