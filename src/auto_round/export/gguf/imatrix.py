"""Importances of inputs (llama.cpp's "imatrix"), read from its two kinds of files, written as the newer one.

An importance is the mean square of an input channel over the tokens that were seen; experts have a row each.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auto_round.checkpoint.disk import atomic_write_bytes, reading
from auto_round.errors import CheckpointError, MissingError
from auto_round.export.gguf.container import make_head
from auto_round.export.gguf.library import gguf
from auto_round.export.gguf.model import GgufModel
from auto_round.export.gguf.values import Value
from auto_round.schemes.gguf_types import TYPES

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1 << 12
_LARGEST = 1 << 28


@dataclass(frozen=True, slots=True)
class Importances:
    """Importances of a model's tensors.

    Attributes:
        rows: tensor name in a GGUF file -> `[experts or 1, in]` float32.
        counts: tensor name -> tokens behind each row, `[experts or 1]` float32.
        datasets: what they were measured on.
    """

    rows: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    datasets: tuple[str, ...] = ()

    @classmethod
    def of_sources(
        cls, model: GgufModel, seen: Mapping[str, tuple[Tensor, int]], datasets: tuple[str, ...] = ()
    ) -> Importances:
        """Importances of the tensors of a file, those of its experts on top of each other.

        Args:
            model: names of the file's tensors.
            seen: name of a tensor in the source -> mean squares of its inputs `[in]`, and tokens behind them.
            datasets: what they were measured on.
        """
        rows: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for tensor in model.tensors:
            experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
            number = torch.zeros(experts, dtype=torch.float32, device="cpu")
            mean = torch.ones(experts, tensor.shape[-1], dtype=torch.float32, device="cpu")
            for piece in tensor.pieces:
                if piece.source in seen:
                    at = piece.start // (tensor.rows // experts)
                    mean[at], number[at] = seen[piece.source]
            if bool(number.any()):
                rows[tensor.name], counts[tensor.name] = mean, number
        return cls(rows, counts, datasets)

    def for_sources(self, model: GgufModel) -> dict[str, Tensor]:
        """Name of a tensor in the source -> importance of its inputs, `[in]`.

        Raises:
            CheckpointError: importances of another model: a length differs, or no name is known.
        """
        found: dict[str, Tensor] = {}
        for tensor in model.tensors:
            rows = self.rows.get(tensor.name)
            if rows is None:
                continue
            experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
            if tuple(rows.shape) != (experts, tensor.shape[-1]):
                raise CheckpointError(
                    f"importances of {tensor.name} are {list(rows.shape)}, the model has "
                    f"{[experts, tensor.shape[-1]]}: they were measured on another model"
                )
            for piece in tensor.pieces:
                found[piece.source] = rows[piece.start // (tensor.rows // experts)]
        if not found:
            raise CheckpointError(
                "no importance belongs to a tensor of this model; the file names "
                f"{', '.join(list(self.rows)[:3])}, the model {', '.join(t.name for t in model.tensors[:3])}"
            )
        return found


def read_imatrix(path: Path) -> Importances:
    """Read a file of either kind: GGUF, or the older `.dat`.

    Source: `IMatrixCollector::save_imatrix` and `save_imatrix_legacy` of llama.cpp, tools/imatrix.

    Raises:
        CheckpointError: not such a file, or damaged.
        ConfigError: no such file, no permission, or the `gguf` package is missing.
    """
    with reading(path):
        if not path.is_file():
            raise MissingError(f"{path} is not a file: --imatrix names what llama-imatrix wrote")
        with path.open("rb") as file:
            magic = file.read(4)
    return _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)


def write_imatrix(path: Path, importances: Importances) -> None:
    """Write a file that llama.cpp's quantizer reads.

    Raises:
        ConfigError: disk full, no permission, or the `gguf` package is missing.
    """
    tensors: dict[str, Tensor] = {}
    for name in sorted(importances.rows):
        counts = importances.counts[name].reshape(-1, 1).float()
        tensors[name + _SUMS] = importances.rows[name].float() * counts
        tensors[name + _COUNTS] = counts
    chunk = max((int(c.max()) for c in importances.counts.values()), default=1)
    metadata = {
        "general.type": Value("str", "imatrix"),
        "imatrix.datasets": Value("str[]", importances.datasets or ("unknown",)),
        "imatrix.chunk_count": Value("u32", 1),
        "imatrix.chunk_size": Value("u32", max(1, chunk)),
    }
    head = make_head("imatrix", metadata, {n: (tuple(t.shape), TYPES["f32"]) for n, t in tensors.items()})
    data = bytearray(head.size)
    data[: len(head.data)] = head.data
    for name, tensor in tensors.items():
        octets = tensor.contiguous().numpy().tobytes()
        data[head.begins[name] : head.begins[name] + len(octets)] = octets
    atomic_write_bytes(path, bytes(data))


def _read_gguf(path: Path) -> Importances:
    try:
        reader = gguf().GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} is not a GGUF file that can be read: {error}") from error
    tensors = {t.name: torch.from_numpy(t.data.copy()).float() for t in reader.tensors}
    rows, counts = {}, {}
    for name, sums in tensors.items():
        if not name.endswith(_SUMS):
            continue
        short = name.removesuffix(_SUMS)
        number = tensors.get(short + _COUNTS)
        if number is None:
            raise CheckpointError(f"{path}: {name} has no {short}{_COUNTS}")
        sums, number = sums.reshape(number.numel(), -1), number.reshape(-1)
        seen = number.clamp_min(1).unsqueeze(-1)
        # An expert that saw no token weighs all inputs alike.
        rows[short] = torch.where(number.unsqueeze(-1) > 0, sums / seen, torch.ones_like(sums))
        counts[short] = number
    if not rows:
        raise CheckpointError(f"{path} holds no importances (tensors called *{_SUMS})")
    field = reader.get_field("imatrix.datasets")
    return Importances(rows, counts, () if field is None else tuple(field.contents()))


def _read_legacy(path: Path) -> Importances:
    """Number of entries; for each its name, calls, numbers; then chunks and the data set's name."""
    with reading(path):
        data = memoryview(path.read_bytes())
    rows, counts = {}, {}
    try:
        (entries,), at = struct.unpack_from("<i", data), 4
        for _ in range(entries):
            name, at = _text(data, at)
            calls, values, at = _numbers(data, at)
            rows[name] = values / max(calls, 1)
            counts[name] = torch.tensor([float(max(calls, 1))], dtype=torch.float32, device="cpu")
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no importance matrix of llama.cpp: {error}") from error
    if not rows:
        raise CheckpointError(f"{path} is no importance matrix of llama.cpp: it has no entries")
    return Importances({n: r.unsqueeze(0) for n, r in rows.items()}, counts, _dataset(data, at))


def _numbers(data: memoryview, at: int) -> tuple[int, Tensor, int]:
    """Number of calls, the values, and the offset behind them."""
    calls, size = struct.unpack_from("<ii", data, at)
    end = at + 8 + 4 * size
    if not 0 < size < _LARGEST or end > len(data):
        raise ValueError(f"{size} numbers at offset {at}, the file has {len(data)} bytes")
    return calls, torch.frombuffer(bytearray(data[at + 8 : end]), dtype=torch.float32), end


def _text(data: Sequence[int], at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<i", bytes(data[at : at + 4]))
    if not 0 < length < _LONGEST_NAME:
        raise ValueError(f"a name of {length} bytes at offset {at}")
    return bytes(data[at + 4 : at + 4 + length]).decode(), at + 4 + length


def _dataset(data: Sequence[int], at: int) -> tuple[str, ...]:
    """Name of the data set behind the entries, which older files lack."""
    try:
        return (_text(data, at + 4)[0],)
    except (struct.error, ValueError, UnicodeDecodeError):
        return ()
