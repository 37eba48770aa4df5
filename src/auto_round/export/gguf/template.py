"""A GGUF file made by llama.cpp's converter as template: its metadata, tokenizer and names, our numbers.

Which rows of the checkpoint a template's tensor consists of is found by comparing numbers, not names: every
row of the checkpoint, rounded as the converter rounded it, is looked up by its hash. So it does not matter
what the converter did with rows: reorder, stack, split or join them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.disk import reading
from auto_round.errors import CheckpointError, ConfigError, MissingError
from auto_round.export.gguf.container import value_of
from auto_round.export.gguf.library import gguf
from auto_round.export.gguf.model import GgufModel
from auto_round.export.gguf.tensors import GgufTensor, Listed, TensorRows
from auto_round.export.gguf.values import Value
from auto_round.facts.layer import Layer
from auto_round.facts.tensor import TensorSpec
from auto_round.models.source import ModelSource, matrix_reader, matrix_tensors
from auto_round.schemes.gguf_mixture import MixtureFacts, Shape, is_quantizable

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_OWN = ("general.architecture", "general.file_type", "general.quantization_version")
_VIRTUAL = "GGUF."
"""Beginning of the reader's names of header fields that are no metadata."""

_SEED = 7


@dataclass(frozen=True, slots=True)
class _Found:
    """A row of the checkpoint."""

    source: str
    row: int


def from_template(path: Path, source: ModelSource) -> GgufModel:
    """A model described by a template.

    Tensors whose rows are all found come from the checkpoint. Others (transposed matrices, changed norms,
    constants) are taken from the template as they are. A layer of which some rows are found nowhere must
    lie in one of these, number by number: llama.cpp stores half of a latent attention's matrix transposed.

    Args:
        path: file with 16- or 32-bit tensors.
        source: the checkpoint; all weights are read once.

    Raises:
        CheckpointError: not a GGUF file, or of another model: names the first layer that it lacks.
        ConfigError: no such file, quantized tensors in it, or the `gguf` package is missing.
    """
    reader = _open(path)
    plain = {t.name: t for t in reader.tensors}
    for name, tensor in plain.items():
        if tensor.tensor_type.name not in _DTYPES:
            raise ConfigError(
                f"{path}: tensor {name} is {tensor.tensor_type.name}; a template has 16- or 32-bit numbers: "
                "make it with convert_hf_to_gguf.py --outtype f16 (or bf16, f32)"
            )
    matched = _match(plain, source)
    tensors, given, kept = [], {}, {}
    for name, tensor in plain.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        pieces = matched.get(name)
        tensors.append(GgufTensor(name, shape, pieces or ()))
        if not pieces:
            given[name] = _values(tensor).reshape(shape)
        if not is_quantizable(Shape(name, shape)):
            kept[name] = tensor.tensor_type.name.lower()
    apart = _stored_apart(path, source, tensors, plain)
    metadata = {
        key: value_of(field)
        for key, field in reader.fields.items()
        if key not in _OWN and not key.startswith(_VIRTUAL)
    }
    version = {"general.quantization_version": Value("u32", 2)}
    arch = str(reader.get_field("general.architecture").contents())
    facts = _facts(arch, metadata)
    return GgufModel(arch, {**metadata, **version}, tuple(tensors), facts, given, kept, apart)


def _open(path: Path) -> Any:
    with reading(path):
        if not path.is_file():
            raise MissingError(f"{path} is not a file: --gguf_template names a GGUF file")
    try:
        return gguf().GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} is not a GGUF file that can be read: {error}") from error


def _facts(arch: str, metadata: Mapping[str, Value]) -> MixtureFacts:
    def number(key: str, default: int) -> int:
        value = metadata.get(f"{arch}.{key}")
        if value is None:
            return default
        first = value.value[0] if isinstance(value.value, tuple) else value.value
        return int(first)

    heads = number("attention.head_count", 1)
    return MixtureFacts(
        arch=arch,
        n_layer=number("block_count", 0),
        n_head=heads,
        n_head_kv=number("attention.head_count_kv", heads),
        n_expert=number("expert_count", 0),
    )


def _values(tensor: Any) -> Tensor:
    """Numbers of a template's tensor, in its dtype, in fresh memory."""
    import numpy as np

    if tensor.tensor_type.name == "BF16":
        return torch.from_numpy(np.ascontiguousarray(tensor.data).view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(tensor.data))


def _match(plain: Mapping[str, Any], source: ModelSource) -> dict[str, tuple[TensorRows, ...]]:
    """Template tensor -> pieces of the checkpoint that make it up, where all of its rows are found."""
    wanted: dict[tuple[int, str], dict[int, list[_Found]]] = {}
    for tensor in plain.values():
        wanted.setdefault((int(tensor.shape[0]), tensor.tensor_type.name), {})
    widths = {width for width, _ in wanted}
    stored, read = matrix_tensors(source), matrix_reader(source)
    for name, spec in stored.items():
        width = spec.shape[-1] if spec.shape else 0
        if width not in widths or not spec.dtype.is_floating_point:
            continue
        rows = read(name).reshape(-1, width)
        for (other, dtype), table in wanted.items():
            if other == width:
                for row, key in enumerate(_hashes(rows.float().to(_DTYPES[dtype]))):
                    table.setdefault(key, []).append(_Found(name, row))
    return {
        name: pieces
        for name, tensor in plain.items()
        if (pieces := _pieces(tensor, wanted[int(tensor.shape[0]), tensor.tensor_type.name], stored))
    }


def _hashes(rows: Tensor) -> list[int]:
    """One number for each row of bits: a sum of products with odd random factors, modulo 2**64."""
    bits = rows.contiguous().view(torch.int16 if rows.element_size() == 2 else torch.int32).to(torch.int64)
    generator = torch.Generator().manual_seed(_SEED)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator, device="cpu") | 1
    found: list[int] = []
    for band in torch.split(bits, max(1, (1 << 22) // bits.shape[1])):
        found += (band * factors).sum(-1).tolist()
    return found


def _pieces(
    tensor: Any, table: Mapping[int, Sequence[_Found]], stored: Mapping[str, TensorSpec]
) -> tuple[TensorRows, ...]:
    """Runs of rows from one source each; empty when a row is unknown.

    Equal rows stand in several places: the source that the row before came from is preferred, and there a
    row that is not yet taken.
    """
    values = _values(tensor)
    runs: list[tuple[str, list[int]]] = []
    taken: set[tuple[str, int]] = set()
    for key in _hashes(values.reshape(-1, values.shape[-1])):
        choices = table.get(key)
        if not choices:
            return ()
        last = runs[-1][0] if runs else ""
        free = [c for c in choices if (c.source, c.row) not in taken] or list(choices)
        best = min(free, key=lambda c: (c.source != last, c.row if c.source == last else 0))
        taken.add((best.source, best.row))
        if best.source != last:
            runs.append((best.source, []))
        runs[-1][1].append(best.row)
    pieces, start = [], 0
    for source, rows in runs:
        height = math.prod(stored[source].shape[:-1])
        order = None if rows == list(range(height)) else Listed(tuple(rows))
        pieces.append(TensorRows(source, start, len(rows), order))
        start += len(rows)
    return tuple(pieces)


def _stored_apart(
    path: Path, source: ModelSource, tensors: Sequence[GgufTensor], plain: Mapping[str, Any]
) -> frozenset[str]:
    """Layers of which some rows lie in the template transposed; all others must lie there row for row."""
    rows: dict[str, set[int]] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            order = (
                torch.arange(piece.rows, device="cpu")
                if piece.order is None
                else piece.order.indices(piece.rows)
            )
            rows.setdefault(piece.source, set()).update(order.tolist())
    sums = {t.name: _sum(_values(plain[t.name])) for t in tensors if not t.pieces and len(t.shape) > 1}
    apart: set[str] = set()
    for layer in source.layers:
        there = rows.get(layer.alone, set())
        again = source.tied_head and layer.name == source.head  # it may be the embedding under another name
        if again or len(there) == layer.shape[0]:
            continue
        if _lies_in(source, layer, there, sums, plain):
            apart.add(layer.alone)
            continue
        shown = _alike(layer, plain)
        raise CheckpointError(
            f"{path} is not a template of this model: the rows of {layer.name} "
            f"{list(layer.shape)} are {'not all' if layer.alone in rows else 'not'} in it{shown}. Make it "
            "from this very checkpoint with convert_hf_to_gguf.py --outtype f16"
        )
    return frozenset(apart)


def _lies_in(
    source: ModelSource, layer: Layer, there: set[int], sums: Mapping[str, int], plain: Mapping[str, Any]
) -> bool:
    """Whether the rows of a layer that were not found are all numbers of one tensor, in any order."""
    missing = [i for i in range(layer.shape[0]) if i not in there]
    count = len(missing) * layer.shape[1]
    alike = {name: total for name, total in sums.items() if math.prod(map(int, plain[name].shape)) == count}
    if not alike:
        return False
    values = source.read(layer)[missing].float()
    return any(
        _sum(values.to(_DTYPES[plain[name].tensor_type.name])) == total for name, total in alike.items()
    )


def _sum(values: Tensor) -> int:
    """One number for a set of numbers: the sum of a hash of each one's bits, modulo 2**64."""
    bits = values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)
    mixed = bits.to(torch.int64) * 0x9E3779B97F4A7C1
    return int(((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B).sum())


def _alike(layer: Layer, plain: Mapping[str, Any]) -> str:
    """A tensor of the template that has the layer's shape and block, to be named in a message."""
    block = "" if layer.block is None else f"blk.{layer.block}."
    names = [
        name
        for name, tensor in plain.items()
        if name.startswith(block) and tuple(int(n) for n in reversed(tensor.shape)) == layer.shape
    ]
    return f" ({', '.join(names[:3])} {'has' if len(names) == 1 else 'have'} its shape)" if names else ""


def with_name(model: GgufModel, name: str) -> GgufModel:
    """The same model under another `general.name`, where the template has none."""
    if "general.name" in model.metadata:
        return model
    return replace(model, metadata={**model.metadata, "general.name": Value("str", name)})
