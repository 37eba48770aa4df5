"""The small files of a Hugging Face folder: config.json and its kin written, tokenizer files copied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from auto_round.checkpoint.disk import atomic_write_bytes, atomic_write_json, reading, writing
from auto_round.errors import CheckpointError
from auto_round.facts.tensor import dtype_name
from auto_round.stored.configuration import DTYPE_KEYS, TEXT_CONFIGS, without_quantization

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""Files beside the weights that are copied byte for byte, as patterns relative to the folder."""

_TIED = "tie_word_embeddings"
"""Some nested configs tie by default and say so nowhere."""

NOT_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4", "plamo2")
"""`model_type`s whose activations leave the range of float16. Source: vLLM `config/model.py`,
`_FLOAT16_NOT_SUPPORTED_MODELS`."""


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder, every key as it is.

    Raises:
        CheckpointError: missing or not a JSON object.
        ConfigError: no permission.
    """
    path = folder / "config.json"
    with reading(path):
        text = path.read_bytes()
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(config).__name__}")
    return config


def output_config(
    source: Mapping[str, Any],
    quantization_config: Mapping[str, Any] | None,
    *,
    untied: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """`config.json` of an output: the source's, with what changed.

    Args:
        source: the source's `config.json`; its own `quantization_config` is replaced.
        quantization_config: of the output; None for a folder that looks unquantized.
        untied: the head has been given tensors of its own.
        dtype: in which readers of this folder should compute; None for the source's. Loaders cast the other
            tensors to it. Models whose activations overflow in float16 keep their own dtype instead.
    """
    config = without_quantization(source)
    if untied:
        for key, value in config.items():
            if isinstance(value, Mapping) and (key in TEXT_CONFIGS or _TIED in value):
                config[key] = {**value, _TIED: False}
        config[_TIED] = False
    if dtype is not None and not (dtype is torch.float16 and _needs_range(source)):
        config = _computing_in(config, dtype_name(dtype))
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    return config


def _needs_range(source: Mapping[str, Any]) -> bool:
    nested = [value for key in TEXT_CONFIGS if isinstance(value := source.get(key), Mapping)]
    return any(config.get("model_type") in NOT_FLOAT16 for config in (source, *nested))


def _computing_in(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same configuration with another dtype, in the language model's own part too."""
    changed = {key: dtype if key in DTYPE_KEYS else value for key, value in config.items()}
    for key in TEXT_CONFIGS:
        part = changed.get(key)
        if isinstance(part, Mapping):
            changed[key] = {k: dtype if k in DTYPE_KEYS else value for k, value in part.items()}
    return changed if any(key in config for key in DTYPE_KEYS) else {**changed, DTYPE_KEYS[1]: dtype}


def write_configs(
    folder: Path,
    source: Mapping[str, Any],
    quantization_config: Mapping[str, Any] | None,
    *,
    untied: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `config.json`, and `quantization_config.json` beside it where there is one.

    Arguments as in `output_config`.

    Raises:
        ConfigError: disk full, no permission.
        CheckpointError: any other failure of the file system.
    """
    if quantization_config is not None:
        atomic_write_json(folder / "quantization_config.json", quantization_config)
    config = output_config(source, quantization_config, untied=untied, dtype=dtype)
    atomic_write_json(folder / "config.json", config)


def side_files(folder: Path) -> tuple[Path, ...]:
    """Files of a model folder that an output needs too, relative to it, sorted."""
    found = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(path.relative_to(folder) for path in found))


def copy_side_files(source: Path, target: Path) -> tuple[Path, ...]:
    """Copy tokenizer, generation, processor and remote-code files byte for byte.

    Args:
        source: model folder; links in it are followed.
        target: output folder; exists.

    Returns:
        What was copied, relative to the folders.

    Raises:
        ConfigError: disk full, no permission.
        CheckpointError: any other failure of the file system.
    """
    names = side_files(source)
    for name in names:
        with reading(source / name):
            data = (source / name).read_bytes()
        with writing(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(target / name, data)
    return names
