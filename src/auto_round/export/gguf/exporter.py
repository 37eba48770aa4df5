"""The exporter of GGUF files: one file, its parts written as layers finish."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.disk import read_at, reading
from auto_round.checkpoint.writer import Shard
from auto_round.errors import InternalError, Refusal
from auto_round.export.exporter import Facts
from auto_round.export.gguf.container import Head, make_head
from auto_round.export.gguf.model import GgufModel
from auto_round.export.gguf.tensors import GgufTensor, Piece
from auto_round.export.gguf.values import Value
from auto_round.export.manifest import Manifest
from auto_round.facts.layer import Block, Layer
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.gguf import GGUF_BLOCKS
from auto_round.numerics.format import Format
from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.schemes.gguf_types import TYPES, FileType, GgufType
from auto_round.schemes.plan import Plan

_PLAIN: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Part:
    """What is written at once: a tensor of the file, or the rows of it that one source tensor gives.

    Attributes:
        tensor: tensor of the file.
        piece: its rows; None for all of them.
        type: type of the tensor.
        begin: offset in the file, bytes.
        spec: dtype and shape of what is written: bytes of rows, or plain numbers.
    """

    tensor: GgufTensor
    piece: Piece | None
    type: GgufType
    begin: int
    spec: TensorSpec


class GgufExporter:
    """One GGUF file with the types of all its tensors decided.

    Attributes:
        name: name of the format, for example `gguf:q4_k_m`.
        file: name of the file inside the output folder.
        model: what it holds.
        types: tensor name -> name of its type.
        head: bytes before the tensors.
        parts: part name -> part, in the order of the file. Parts of tensors that several source tensors make
            up are called `<tensor>/<number>`.
    """

    def __init__(self, wanted: FileType, file: str, model: GgufModel, types: Mapping[str, str]) -> None:
        self.name = f"gguf:{wanted.name}"
        self.file = file
        self.model = model
        self.types = dict(types)
        listed = {t.name: (t.shape, TYPES[types[t.name]]) for t in model.tensors}
        metadata = {**model.metadata, "general.file_type": Value("u32", wanted.number)}
        self.head: Head = make_head(model.arch, metadata, listed)
        self.parts = dict(self._all_parts())
        self._of_source: dict[str, list[str]] = {}
        for name, part in self.parts.items():
            for piece in part.tensor.pieces if part.piece is None else (part.piece,):
                self._of_source.setdefault(piece.source, []).append(name)

    def __repr__(self) -> str:
        return f"GgufExporter({self.name}, {self.file}, {hashlib.sha256(self.head.data).hexdigest()[:16]})"

    @property
    def shards(self) -> tuple[Shard]:
        """The file as the shard writer wants it."""
        begins = {name: part.begin for name, part in self.parts.items()}
        return (Shard(self.file, self.head.data, begins, self.head.size),)

    def for_plan(self, plan: Plan, layers: Sequence[Layer]) -> GgufExporter:
        """This exporter is made for one plan already."""
        return self

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """Layers whose planned format is not the type of their tensor: none, when the plan is this file's."""
        return [
            Refusal(self.name, f"{layer.name} is planned as {fmt.name}, its tensor is {part.type.name}")
            for layer in layers
            if (fmt := plan.format_of(layer.name)) is not None
            for part in self._parts_of(layer)
            if fmt != GGUF_FORMATS.get(part.type.name)
        ]

    def spec(self, layer: Layer, fmt: Format) -> Mapping[str, TensorSpec]:
        """Part name -> bytes of its rows."""
        return {name: self.parts[name].spec for name in self._of_source.get(layer.tensor, ())}

    def encode(self, layer: Layer, q: QuantizedLayer) -> Mapping[str, Tensor]:
        """The parts of `spec`; none for a head that the file stores as the embedding, under another name."""
        names = self._of_source.get(layer.tensor, ())
        if not names:
            return {}
        octets = pack_rows(q.weight)
        found = {}
        for name in names:
            piece = self.parts[name].piece
            if piece is None:
                raise InternalError(f"{layer.name} is one of several layers in {name}, of type 16 bits")
            found[name] = piece.arrange(octets)
        return found

    def encode_plain(self, source: str, value: Tensor) -> Mapping[str, Tensor]:
        """Parts of a tensor that is stored as plain numbers: norms, biases, kept layers.

        Args:
            source: its name in the source.
            value: the whole tensor.
        """
        found = {}
        for name in self._of_source.get(source, ()):
            part = self.parts[name]
            if part.piece is None or part.type.name not in _PLAIN:
                raise InternalError(f"{name} is not stored as plain numbers of one tensor")
            rows = part.tensor.prepare(part.piece, value)
            found[name] = rows.to(_PLAIN[part.type.name]).reshape(part.spec.shape).contiguous()
        return found

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: Facts | None = None
    ) -> dict[str, Any] | None:
        """None: the file describes itself."""
        return None

    def manifest(self, plan: Plan, layers: Sequence[Layer]) -> Manifest:
        """Parts of the file; nothing is copied byte for byte."""
        encoded = {
            layer.name: tuple(self._of_source.get(layer.tensor, ()))
            for layer in layers
            if plan.scheme_of(layer.name) is not None
        }
        return Manifest({name: part.spec for name, part in self.parts.items()}, (), encoded)

    def read_part(self, folder: Path, name: str) -> bytes:
        """Bytes of a part as they lie on disk."""
        part = self.parts[name]
        data = bytearray(math.prod(part.spec.shape) * part.spec.dtype.itemsize)
        path = folder / self.file
        with reading(path), path.open("rb") as file:
            read_at(file.fileno(), memoryview(data), part.begin)
        return bytes(data)

    def histogram(self) -> dict[str, tuple[int, int, int]]:
        """Type name -> number of tensors, weights and bytes."""
        found: dict[str, tuple[int, int, int]] = {}
        for tensor in self.model.tensors:
            kind = TYPES[self.types[tensor.name]]
            count, weights, size = found.get(kind.name, (0, 0, 0))
            new = tensor.rows * tensor.shape[-1]
            found[kind.name] = (count + 1, weights + new, size + kind.nbytes(tensor.shape))
        return found

    def _parts_of(self, layer: Layer) -> list[Part]:
        return [self.parts[name] for name in self._of_source.get(layer.tensor, ())]

    def _all_parts(self) -> Iterable[tuple[str, Part]]:
        for tensor in self.model.tensors:
            kind = TYPES[self.types[tensor.name]]
            begin = self.head.begins[tensor.name]
            if len(tensor.pieces) < 2:
                piece = tensor.pieces[0] if tensor.pieces else None
                yield tensor.name, Part(tensor, piece, kind, begin, _spec(tensor, tensor.rows, kind))
                continue
            for i, piece in enumerate(tensor.pieces):
                offset = begin + piece.start * kind.row_bytes(tensor.shape[-1])
                yield f"{tensor.name}/{i}", Part(tensor, piece, kind, offset, _spec(tensor, piece.rows, kind))


def pack_rows(q: QTensor) -> Tensor:
    """Bytes of a quantized matrix, `[out, bytes of a row]` uint8."""
    return GGUF_BLOCKS[q.format.name].pack(q)["weight"]


def _spec(tensor: GgufTensor, rows: int, kind: GgufType) -> TensorSpec:
    width = tensor.shape[-1]
    if kind.name in _PLAIN:
        return TensorSpec(_PLAIN[kind.name], (rows, width))
    return TensorSpec(torch.uint8, (rows, kind.row_bytes(width)))
