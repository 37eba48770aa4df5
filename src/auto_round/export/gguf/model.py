"""What goes into a GGUF file besides the types of its tensors: architecture, metadata, names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from auto_round.export.gguf.families import family_of
from auto_round.export.gguf.hyperparameters import hyperparameters, kv_heads
from auto_round.export.gguf.names import name_tensors
from auto_round.export.gguf.tensors import GgufTensor, TensorRows
from auto_round.export.gguf.tokenizer import tokenizer_metadata
from auto_round.export.gguf.values import Metadata, Value
from auto_round.facts.layer import Role
from auto_round.models.source import ModelSource
from auto_round.schemes.gguf_mixture import MixtureFacts, Shape

QUANTIZATION_VERSION = 2
"""`general.quantization_version`. Source: `GGML_QNT_VERSION` of ggml.h."""


@dataclass(frozen=True, slots=True, eq=False)
class GgufModel:
    """A model as llama.cpp will see it.

    Attributes:
        arch: `general.architecture`.
        metadata: all keys but the architecture and the file type.
        tensors: every tensor of the file, in order.
        facts: what decides on the types of tensors; `imatrix` is not yet known.
        given: values of tensors that come from a template, by name.
        kept: tensor name -> type that it has in a template and keeps, where no mixture touches it.
        apart: tensors of the source that the file has transposed, at least in part: they are rounded to the
            file's types, but not tuned.
    """

    arch: str
    metadata: Metadata
    tensors: tuple[GgufTensor, ...]
    facts: MixtureFacts
    given: Mapping[str, Tensor]
    kept: Mapping[str, str] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Names and shapes."""
        return tuple(Shape(t.name, t.shape) for t in self.tensors)

    def places(self) -> dict[str, tuple[tuple[GgufTensor, TensorRows], ...]]:
        """Name of a tensor in the source -> the tensors and pieces that it becomes."""
        found: dict[str, tuple[tuple[GgufTensor, TensorRows], ...]] = {}
        for tensor in self.tensors:
            for piece in tensor.pieces:
                found[piece.source] = (*found.get(piece.source, ()), (tensor, piece))
        return found


def describe_gguf(source: ModelSource, tokenizer: Any, name: str) -> GgufModel:
    """Metadata and tensor names of a model of a known family.

    Args:
        source: the model; no weights are read.
        tokenizer: its tokenizer.
        name: `general.name`.

    Raises:
        UnsupportedError: a family without a row in the table, a configuration or a tokenizer that llama.cpp
            has no words for.
        ConfigError: the `gguf` package is not installed.
    """
    config = source.facts.text
    family = family_of(config)
    numbers = hyperparameters(family, config)
    if family.deepstack:
        count = len(source.config.vision_config.deepstack_visual_indexes)
        numbers[f"{family.arch}.n_deepstack_layers"] = Value("u32", count)
    tensors = name_tensors(family, config, source.tensors, _tied(source), source.text_tensors)
    vocabulary = tokenizer_metadata(tokenizer, config)
    metadata = {**_general(source, name), **numbers, **vocabulary}
    return GgufModel(family.arch, metadata, tensors, facts_of(family.arch, config), {})


def facts_of(arch: str, config: Any) -> MixtureFacts:
    """What decides on types, from the text model's configuration."""
    experts = next(
        (n for key in ("num_local_experts", "num_experts") if (n := getattr(config, key, None))), 0
    )
    return MixtureFacts(
        arch=arch,
        n_layer=int(config.num_hidden_layers),
        n_head=int(config.num_attention_heads),
        n_head_kv=kv_heads(config),
        n_expert=int(experts),
    )


def _tied(source: ModelSource) -> frozenset[str]:
    """The head's own tensor, where the checkpoint holds the embedding a second time under that name."""
    head = next((layer for layer in source.layers if layer.role is Role.HEAD), None)
    again = source.tied_head and head is not None and head.tensor == f"{head.name}.weight"
    return frozenset({head.tensor}) if head is not None and again else frozenset()


def _general(source: ModelSource, name: str) -> dict[str, Value]:
    weights = sum(source.tensors[name].count for name in source.text_tensors)
    return {
        "general.type": Value("str", "model"),
        "general.name": Value("str", name),
        "general.size_label": Value("str", _size_label(weights)),
        "general.quantization_version": Value("u32", QUANTIZATION_VERSION),
    }


def _size_label(weights: int) -> str:
    """For example `8.2B` or `560M`."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if weights >= factor:
            return f"{weights / factor:.{1 if weights < 10 * factor else 0}f}{unit}"
    return f"{weights / 1e3:.0f}K"


def model_name(folder: Path | None, hub_id: str, config: Any) -> str:
    """Name for people: last part of the hub id, else the folder's, else the model type."""
    if hub_id and not Path(hub_id).exists():
        return hub_id.rpartition("/")[2]
    return folder.name if folder is not None and folder.name else str(config.model_type)
