"""Header of one safetensors file: parsed as hostile input, built before any weight is known.

A file is: length of the header (8 bytes, little-endian), the header (a JSON object padded with spaces), then
the bytes of all tensors without holes. Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.checkpoint.disk import read_at, reading
from auto_round.checkpoint.dtypes import DTYPES, safetensors_name
from auto_round.errors import CheckpointError, nearest

MAX_JSON_BYTES = 100_000_000
"""Longest header or index that is read. Source: `MAX_HEADER_SIZE` of safetensors."""

_MAX_RANK = 64  # torch cannot iterate over tensors of more dimensions
_MAX_ELEMENTS = 2**63 - 1
_METADATA = "__metadata__"

Spec = tuple[torch.dtype, Sequence[int]]
"""Dtype and shape of a tensor to be written."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        dtype: element type.
        shape: sizes.
        file: file that holds it.
        begin: offset of its first byte in that file, bytes from the file's start.
        end: offset after its last byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Length, bytes."""
        return self.end - self.begin


def nbytes_of(spec: Spec) -> int:
    """Bytes that a tensor takes in a file."""
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def build_header(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """Header of a file that holds these tensors, and the absolute offset of each.

    Wider elements come first, otherwise in the order given, so that every tensor starts at a multiple of its
    element size, which readers that map the file rely on.

    Returns:
        The bytes before the first tensor (a multiple of 8 in number), and name -> offset in the file, bytes.
    """
    order = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    entries: dict[str, Any] = {_METADATA: {"format": "pt"}}
    begins: dict[str, int] = {}
    position = 0
    for name in order:
        dtype, shape = specs[name]
        begins[name] = position
        position += nbytes_of(specs[name])
        offsets = [begins[name], position]
        entries[name] = {
            "dtype": safetensors_name(dtype),
            "shape": [int(n) for n in shape],
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}


def read_header(fd: int, file: Path) -> dict[str, TensorInfo]:
    """Parse and check the header of an open file; tensors come in the order of their bytes.

    Raises:
        CheckpointError: anything that contradicts the format, the file's size or itself.
    """
    size = os.fstat(fd).st_size
    prefix = bytearray(8)
    if read_at(fd, memoryview(prefix), 0) < 8:
        raise CheckpointError(f"{file}: only {size} bytes long, too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{file}: header length {length} at offset 0 is above the limit of {MAX_JSON_BYTES} bytes: "
            "not a safetensors file, or corrupt; fetch it again"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{file}: truncated inside its header, which takes {length} bytes from offset 8, "
            f"while the file ends at {size}; fetch it again"
        )
    text = bytearray(length)
    read_at(fd, memoryview(text), 8)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file}: the header at offset 8 does not begin with a brace; fetch it again")
    entries = parse_json_object(bytes(text), f"{file}: header at offset 8")
    _check_metadata(entries.pop(_METADATA, {}), file)
    infos = {name: _info(name, entry, file, 8 + length) for name, entry in entries.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_coverage(ordered, file, 8 + length, size)
    return ordered


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    with reading(path):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: longer than {MAX_JSON_BYTES} bytes")
        text = path.read_bytes()
    return parse_json_object(text, str(path))


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object from a file that may be hostile: duplicate keys and endless numbers are refused.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, or a key given twice; says `what` it was.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_short_int)
    except RecursionError:
        raise CheckpointError(f"{what}: nested too deeply") from None
    except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{what}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Object from its pairs; a key given twice is an error, since readers disagree on which one counts."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f'key "{key}" occurs twice')
        key.encode()  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
        result[key] = value
    return result


def _short_int(digits: str) -> int:
    """Integer of at most 20 digits: enough for 64 bits, and parsing time stays linear."""
    if len(digits) > 20:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _check_metadata(metadata: Any, file: Path) -> None:
    """Refuse metadata that is not a map of strings."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: {_METADATA} of the header must map strings to strings")


def _info(name: str, entry: Any, file: Path, base: int) -> TensorInfo:
    """One checked entry of a header; `base` is the offset of the first tensor."""
    where = f'{file}: tensor "{name}"'
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header entry must have exactly dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"{where}: dtype {kind!r} is not supported; {nearest(str(kind), DTYPES)}")
    if not _sizes(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(
            f"{where}: shape must be at most {_MAX_RANK} sizes from 0 up, got {_short(shape)}"
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be [begin, end], got {_short(offsets)}")
    if math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise CheckpointError(f"{where}: shape {_short(shape)} is too large")
    dtype = DTYPES[kind]
    begin, end = base + offsets[0], base + offsets[1]
    wanted = nbytes_of((dtype, shape))
    if wanted != end - begin:
        raise CheckpointError(
            f"{where}: {kind} of shape {shape} takes {wanted} bytes, "
            f"but it has {end - begin} at offset {begin}"
        )
    return TensorInfo(dtype, tuple(shape), file, begin, end)


def _sizes(value: Any) -> bool:
    """True for a list of plain integers that are not negative."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _short(value: Any) -> str:
    """Text of a value from a file, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_coverage(infos: Mapping[str, TensorInfo], file: Path, base: int, size: int) -> None:
    """Refuse holes, overlaps, bytes left over, and files that end too early."""
    position = base
    for name, info in infos.items():
        if info.begin != position:
            fault = "overlaps the one before it" if info.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f'{file}: tensor "{name}" at offset {info.begin} {fault}, which ends at {position}'
            )
        position = info.end
        if position > size:
            raise CheckpointError(
                f'{file}: truncated: tensor "{name}" takes bytes {info.begin} to {info.end}, '
                f"but the file ends at {size}; fetch it again"
            )
    if position != size:
        raise CheckpointError(
            f"{file}: {size - position} bytes after the last tensor, which ends at {position}"
        )
