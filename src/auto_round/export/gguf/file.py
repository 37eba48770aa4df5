"""A GGUF file with everything decided: the bytes before its tensors, and the parts in which it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auto_round.checkpoint.disk import read_at, reading
from auto_round.checkpoint.writer import Shard
from auto_round.errors import InternalError
from auto_round.export.gguf.container import Head, make_head
from auto_round.export.gguf.model import GgufModel
from auto_round.export.gguf.nvfp4 import KIND, scale_of
from auto_round.export.gguf.tensors import Change, GgufTensor, TensorRows
from auto_round.export.gguf.values import Value
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.gguf import GGUF_BLOCKS
from auto_round.numerics.qtensor import QTensor
from auto_round.schemes.gguf_types import TYPES, FileType, GgufType

TYPE_OF_FORMAT = {block.format.name: name for name, block in GGUF_BLOCKS.items()}
"""Name of a numeric format -> that of the type."""

_PLAIN: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GgufPart:
    """What is written in one go: a tensor of the file, or the rows of it that come from one source tensor.

    Attributes:
        tensor: tensor of the file.
        piece: its rows; None for all of them.
        type: type of the tensor.
        begin: offset in the file, bytes.
        spec: dtype and shape of what is written: bytes of rows, or plain numbers.
    """

    tensor: GgufTensor
    piece: TensorRows | None
    type: GgufType
    begin: int
    spec: TensorSpec


class GgufFile:
    """One GGUF file with the types of all its tensors.

    Attributes:
        name: name of the file inside the output folder.
        model: what it holds.
        types: tensor name -> name of its type.
        tensors: those of the model, and the numbers of NVFP4 matrices.
        head: bytes before the tensors.
        parts: part name -> part, in the order of the file. Parts of tensors that several source tensors make
            up are called `<tensor>/<number>`.
        sources: tensor of the source -> names of the parts that it becomes.
    """

    def __init__(self, wanted: FileType, name: str, model: GgufModel, types: Mapping[str, str]) -> None:
        self.name = name
        self.model = model
        scales = tuple(scale_of(t) for t in model.tensors if types[t.name] == KIND)
        self.types = {**types, **{t.name: "f32" for t in scales}}
        self.tensors = (*model.tensors, *scales)
        listed = {t.name: (t.shape, TYPES[self.types[t.name]]) for t in self.tensors}
        metadata = {**model.metadata, "general.file_type": Value("u32", wanted.number)}
        self.head: Head = make_head(model.arch, metadata, listed)
        self.parts = dict(self._all_parts())
        self.sources: dict[str, list[str]] = {}
        for part_name, part in self.parts.items():
            for piece in part.tensor.pieces if part.piece is None else (part.piece,):
                self.sources.setdefault(piece.source, []).append(part_name)

    def __repr__(self) -> str:
        return f"GgufFile({self.name}, {hashlib.sha256(self.head.data).hexdigest()[:16]})"

    def parts_of(self, source: str) -> dict[str, GgufPart]:
        """Parts that a tensor of the source becomes, by name; none where the file stores it otherwise."""
        return {name: self.parts[name] for name in self.sources.get(source, ())}

    @property
    def shard(self) -> Shard:
        """The file as the shard writer wants it."""
        begins = {name: part.begin for name, part in self.parts.items()}
        return Shard(self.name, self.head.data, begins, self.head.size)

    def encode(self, layer: str, source: str, q: QTensor) -> dict[str, Tensor]:
        """Part name -> bytes of its rows, for a quantized matrix; none for one that the file lacks.

        Args:
            layer: name of the layer.
            source: its tensor in the source.
            q: its codes.
        """
        parts = self.parts_of(source)
        if not parts:
            return {}
        packed = GGUF_BLOCKS[TYPE_OF_FORMAT[q.format.name]].pack(q)
        octets, found = packed["weight"], {}
        for name, part in parts.items():
            if part.tensor.change is Change.SCALE:
                found[name] = packed["scale"]
                continue
            if part.piece is None:
                raise InternalError(f"{layer} is one of several layers in {name}, of type 16 bits")
            found[name] = part.piece.arrange(octets)
        return found

    def encode_plain(self, source: str, value: Tensor) -> dict[str, Tensor]:
        """Part name -> what is stored of a tensor of the source that is kept as plain numbers."""
        found = {}
        for name, part in self.parts_of(source).items():
            if part.piece is None or part.type.name not in _PLAIN:
                raise InternalError(f"{name} is not stored as plain numbers of one tensor")
            rows = part.tensor.prepare(part.piece, value)
            found[name] = rows.to(_PLAIN[part.type.name]).reshape(part.spec.shape).contiguous()
        return found

    def rows_of(self, part: GgufPart, read: Callable[[str], Tensor]) -> Tensor:
        """Numbers of a part before they are stored, from the source, a constant or the template."""
        if part.piece is not None:
            return part.tensor.prepare(part.piece, read(part.piece.source))
        if part.tensor.values:
            return torch.tensor(part.tensor.values, dtype=torch.float32, device="cpu")
        if part.tensor.name not in self.model.given:
            raise InternalError(f"{part.tensor.name} has no source")
        given = self.model.given[part.tensor.name]
        return given.reshape(-1, given.shape[-1])

    def read_part(self, folder: Path, name: str) -> Tensor:
        """Bytes of a part as they lie on disk, uint8."""
        part = self.parts[name]
        data = bytearray(part.spec.nbytes)
        path = folder / self.name
        with reading(path), path.open("rb") as file:
            read_at(file.fileno(), memoryview(data), part.begin)
        return torch.frombuffer(data, dtype=torch.uint8)

    def histogram(self) -> dict[str, tuple[int, int, int]]:
        """Type name -> number of tensors, weights and bytes."""
        found: dict[str, tuple[int, int, int]] = {}
        for tensor in self.tensors:
            kind = TYPES[self.types[tensor.name]]
            count, weights, size = found.get(kind.name, (0, 0, 0))
            new = tensor.rows * tensor.shape[-1]
            found[kind.name] = (count + 1, weights + new, size + kind.nbytes(tensor.shape))
        return found

    def _all_parts(self) -> Iterable[tuple[str, GgufPart]]:
        for tensor in self.tensors:
            kind = TYPES[self.types[tensor.name]]
            begin = self.head.begins[tensor.name]
            if tensor.change is Change.SCALE:
                for i, piece in enumerate(tensor.pieces):
                    spec = TensorSpec(torch.float32, (1,))
                    yield f"{tensor.name}/{i}", GgufPart(tensor, piece, kind, begin + 4 * i, spec)
                continue
            if len(tensor.pieces) < 2:
                whole = tensor.pieces[0] if tensor.pieces else None
                yield tensor.name, GgufPart(tensor, whole, kind, begin, _spec(tensor, tensor.rows, kind))
                continue
            for i, piece in enumerate(tensor.pieces):
                offset = begin + piece.start * kind.row_bytes(tensor.shape[-1])
                yield (
                    f"{tensor.name}/{i}",
                    GgufPart(tensor, piece, kind, offset, _spec(tensor, piece.rows, kind)),
                )


def pack_rows(q: QTensor) -> Tensor:
    """Bytes of a quantized matrix, `[out, bytes of a row]` uint8."""
    return GGUF_BLOCKS[TYPE_OF_FORMAT[q.format.name]].pack(q)["weight"]


def _spec(tensor: GgufTensor, rows: int, kind: GgufType) -> TensorSpec:
    width = tensor.shape[-1]
    if kind.name in _PLAIN:
        return TensorSpec(_PLAIN[kind.name], (rows, width))
    return TensorSpec(torch.uint8, (rows, kind.row_bytes(width)))
