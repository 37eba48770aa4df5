"""The second file of a model that reads images: its encoder and projector, which llama.cpp reads apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.disk import writing
from auto_round.checkpoint.header import read_object
from auto_round.errors import CheckpointError, ConfigError, Refusal, UnsupportedError
from auto_round.export.gguf.container import add_tensor, add_value
from auto_round.export.gguf.library import gguf
from auto_round.export.gguf.names import SUFFIXES
from auto_round.export.gguf.projectors import Projector, projector_of
from auto_round.export.gguf.values import Value
from auto_round.facts.tensor import MATRIX
from auto_round.models.source import ModelSource
from auto_round.schemes.gguf_types import TYPES

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_FILE_TYPES = {"f16": 1, "q8_0": 7}
"""`general.file_type`. Source: `LlamaFileType` of the gguf package."""
_ROW = 32
"""Numbers of a block of Q8_0."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the file: where its numbers come from and what becomes of them."""

    source: str
    name: str
    shape: tuple[int, ...]
    type: str
    plus_one: bool

    def numbers(self, read: Callable[[str], Tensor]) -> Tensor:
        """Its values, float32."""
        value = read(self.source).float()
        return value + 1 if self.plus_one else value


@dataclass(frozen=True, slots=True)
class Mmproj:
    """An mmproj file with everything decided.

    Attributes:
        name: name of the file.
        metadata: all keys but the architecture.
        tensors: its tensors, in the order of the checkpoint.
    """

    name: str
    metadata: Mapping[str, Value]
    tensors: tuple[_Tensor, ...]

    def write(self, folder: Path, read: Callable[[str], Tensor]) -> None:
        """Write the file, one tensor after another.

        Args:
            folder: the output's.
            read: reads a tensor of the source by name.

        Raises:
            ConfigError: disk full, no permission.
        """
        module = gguf()
        writer = module.GGUFWriter(None, "clip")
        for key, value in self.metadata.items():
            add_value(module, writer, key, value)
        for tensor in self.tensors:
            add_tensor(module, writer, tensor.name, tensor.shape, TYPES[tensor.type])
        with writing(folder / self.name):
            writer.write_header_to_file(folder / self.name)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in self.tensors:
                kind = module.GGMLQuantizationType[tensor.type.upper()]
                writer.write_tensor_data(module.quants.quantize(tensor.numbers(read).numpy(), kind))
            writer.close()

    def check(self, folder: Path, read: Callable[[str], Tensor]) -> dict[str, Any]:
        """Read the file back with the `gguf` package and compare every number with the source.

        Raises:
            CheckpointError: a tensor is not what it should be.
        """
        path, module = folder / self.name, gguf()
        there = {tensor.name: tensor for tensor in module.GGUFReader(path).tensors}
        worst = 0.0
        for wanted in self.tensors:
            found = there.get(wanted.name)
            if found is None:
                raise CheckpointError(f"{path}: tensor {wanted.name} is not in it")
            stored = module.quants.dequantize(found.data, found.tensor_type)
            numbers = wanted.numbers(read)
            read_back = torch.tensor(stored, dtype=torch.float32, device="cpu")
            error = read_back.reshape(numbers.shape) - numbers
            size = float(numbers.square().mean().sqrt()) or 1.0
            worst = max(worst, float(error.square().mean().sqrt()) / size)
        if not worst <= _LARGEST_ERROR:
            raise CheckpointError(f"{path}: a tensor differs from its source by {worst:.2g} of its size")
        return {"mmproj": self.name, "mmproj_tensors": len(there), "mmproj_error": worst}


_LARGEST_ERROR = 0.03
"""As `verify.LARGEST_ERROR` has it for Q8_0."""


def describe_mmproj(source: ModelSource, kind: str, name: str) -> Mmproj:
    """Metadata and tensors of the file.

    Args:
        source: the model; no weights are read.
        kind: a key of `_FILE_TYPES`, for its matrices.
        name: name of the model.

    Raises:
        UnsupportedError: this encoder is not in the table, or a tensor has no name in llama.cpp.
        ConfigError: the folder does not say how images are prepared.
    """
    config = source.config
    row = projector_of(config)
    told = _processor(source)
    tensors = _tensors(source, row, kind)
    metadata = _metadata(config, row, told) | {
        "general.type": Value("str", "mmproj"),
        "general.name": Value("str", name),
        "general.file_type": Value("u32", _FILE_TYPES[kind]),
    }
    return Mmproj(f"mmproj-{name}-{kind.upper()}.gguf", metadata, tensors)


def _tensors(source: ModelSource, row: Projector, kind: str) -> tuple[_Tensor, ...]:
    module = gguf()
    blocks = int(source.config.vision_config.num_hidden_layers)
    names = module.get_tensor_name_map(module.MODEL_ARCH.MMPROJ, blocks)
    found, nameless = [], []
    for disk in sorted(source.tensors.keys() - source.text_tensors.keys()):
        text = disk
        for pattern, replacement in row.renamed:
            text = re.sub(pattern, replacement, text)
        if any(re.search(pattern, text) for pattern in row.left_out):
            continue
        name = names.get_name(text, try_suffixes=SUFFIXES)
        if name is None:
            nameless.append(disk)
            continue
        shape = tuple(source.tensors[disk].shape)
        plus = any(re.search(pattern, text) for pattern in row.plus_one)
        found.append(_Tensor(disk, name, shape, _type(text, shape, row, kind), plus))
    if nameless:
        raise UnsupportedError(
            f"{len(nameless)} tensors have no name in an mmproj file: {', '.join(nameless[:4])}",
            [Refusal("gguf", "llama.cpp would not read them", "leave out --mmproj")],
        )
    return tuple(found)


def _type(text: str, shape: tuple[int, ...], row: Projector, kind: str) -> str:
    """Vectors and embeddings are 32 bits wide, matrices whose rows no block of Q8_0 divides 16."""
    if len(shape) < MATRIX or any(re.search(pattern, text) for pattern in row.wide):
        return "f32"
    narrow = kind == "q8_0" and len(shape) == MATRIX and shape[-1] % _ROW == 0
    return "q8_0" if narrow and not any(re.search(pattern, text) for pattern in row.half) else "f16"


def _metadata(config: Any, row: Projector, told: Mapping[str, Any]) -> dict[str, Value]:
    vision, text = config.vision_config, config.get_text_config()
    found = {
        "clip.has_vision_encoder": Value("bool", True),
        "clip.projector_type": Value("str", row.kind),
        "clip.use_gelu": Value("bool", True),
        "clip.vision.projection_dim": Value("u32", int(text.hidden_size)),
        "clip.vision.image_size": Value("u32", int(vision.image_size)),
        "clip.vision.patch_size": Value("u32", int(vision.patch_size)),
        "clip.vision.embedding_length": Value("u32", int(vision.hidden_size)),
        "clip.vision.feed_forward_length": Value("u32", int(vision.intermediate_size)),
        "clip.vision.block_count": Value("u32", int(vision.num_hidden_layers)),
        "clip.vision.attention.head_count": Value("u32", int(vision.num_attention_heads)),
        "clip.vision.attention.layer_norm_epsilon": Value("f32", float(vision.layer_norm_eps)),
    }
    for key in ("image_mean", "image_std"):
        found[f"clip.vision.{key}"] = Value("f32[]", tuple(float(n) for n in told[key]))
    return found | row.numbers(config, told)


def _processor(source: ModelSource) -> Mapping[str, Any]:
    """What the model's folder says of how images are prepared."""
    for name in _PROCESSORS if source.folder is not None else ():
        path = source.folder / name if source.folder is not None else Path(name)
        if path.is_file():
            told = read_object(path)
            told = told.get("image_processor") or told
            if "image_mean" in told and "image_std" in told:
                return told
    raise ConfigError(
        "an mmproj file tells how images are prepared, and nothing in the model's folder does: expected "
        "image_mean and image_std in preprocessor_config.json or processor_config.json; copy it from the "
        "original"
    )
