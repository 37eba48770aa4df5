"""What `config.json` says of how the weights of a model are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
"""Nested configs of language models."""
_QUANTIZED = ("quantization_config", "compression_config")
"""Keys of `config.json` that say how a model is stored; the second is compressed-tensors' older one."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Names of the model's dtype; the second in files of Transformers before 5."""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What `config.json` says of how weights are stored, also in its part for language; None if plain."""
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        for key in _QUANTIZED:
            if isinstance(part, Mapping) and part.get(key):
                found: Mapping[str, Any] = part[key]
                return found
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same `config.json` of the plain model."""
    plain = {key: value for key, value in config.items() if key not in _QUANTIZED}
    for key in TEXT_CONFIGS:
        if isinstance(part := plain.get(key), Mapping):
            plain[key] = {k: v for k, v in part.items() if k not in _QUANTIZED}
    return plain


def is_plain(dtype: torch.dtype) -> bool:
    """Whether weights of a dtype are plain numbers rather than codes."""
    return dtype.is_floating_point and dtype.itemsize > 1


def dtype_of(config: Mapping[str, Any]) -> torch.dtype | None:
    """Dtype that `config.json` gives the model, itself or in its part for language."""
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        for key in DTYPE_KEYS:
            if isinstance(part, Mapping) and isinstance(name := part.get(key), str):
                found = getattr(torch, name.removeprefix("torch."), None)
                if isinstance(found, torch.dtype) and is_plain(found):
                    return found
    return None
