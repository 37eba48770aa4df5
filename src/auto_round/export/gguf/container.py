"""The bytes of a GGUF file around its tensors: header, metadata, list of tensors, padding."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.export.gguf.library import gguf
from auto_round.export.gguf.values import Metadata, Value
from auto_round.schemes.gguf_types import GgufType

ALIGNMENT = 32
"""Bytes; tensors begin at multiples. Source: the default of `general.alignment`, docs/gguf.md of ggml."""

_KINDS = {
    "u8": "UINT8",
    "i8": "INT8",
    "u16": "UINT16",
    "i16": "INT16",
    "u32": "UINT32",
    "i32": "INT32",
    "u64": "UINT64",
    "i64": "INT64",
    "f32": "FLOAT32",
    "f64": "FLOAT64",
    "bool": "BOOL",
    "str": "STRING",
}


@dataclass(frozen=True, slots=True)
class Head:
    """Everything before the first tensor, and where the tensors lie.

    Attributes:
        data: bytes before the first tensor.
        begins: tensor name -> offset in the file, bytes.
        size: length of the file, bytes.
    """

    data: bytes
    begins: Mapping[str, int]
    size: int


def make_head(arch: str, metadata: Metadata, tensors: Mapping[str, tuple[tuple[int, ...], GgufType]]) -> Head:
    """Head of a file, as the `gguf` package writes it.

    Args:
        arch: `general.architecture`.
        metadata: everything else.
        tensors: name -> shape `[..., in]` and type, in the order of the file.

    Raises:
        ConfigError: the package is not installed.
    """
    module = gguf()
    writer = module.GGUFWriter(None, arch)
    for key, value in metadata.items():
        add_value(module, writer, key, value)
    begins: dict[str, int] = {}
    position = 0
    for name, (shape, kind) in tensors.items():
        add_tensor(module, writer, name, shape, kind)
        begins[name] = position
        position += _padded(kind.nbytes(shape))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = path.read_bytes()
    data += bytes(_padded(len(data)) - len(data))
    return Head(data, {n: len(data) + begin for n, begin in begins.items()}, len(data) + position)


def value_of(field: Any) -> Value:
    """A field of the `gguf` package's reader as a value that `make_head` writes again."""
    module = gguf()
    names = {module.GGUFValueType[theirs]: ours for ours, theirs in _KINDS.items()}
    if field.types[0] == module.GGUFValueType.ARRAY:
        return Value(f"{names[field.types[1]]}[]", tuple(field.contents()))
    return Value(names[field.types[0]], field.contents())


def add_value(module: Any, writer: Any, key: str, value: Value) -> None:
    """Tell the `gguf` package's writer one key."""
    types = module.GGUFValueType
    if value.kind.endswith("[]"):
        inner = types[_KINDS[value.kind.removesuffix("[]")]]
        if value.value:  # the package cannot write empty lists, and readers take a missing one for empty
            writer.add_key_value(key, list(value.value), types.ARRAY, sub_type=inner)
    else:
        writer.add_key_value(key, value.value, types[_KINDS[value.kind]])


def add_tensor(module: Any, writer: Any, name: str, shape: tuple[int, ...], kind: GgufType) -> None:
    """Tell the `gguf` package's writer of one tensor, without its numbers."""
    import numpy as np

    writer.add_tensor_info(
        name,
        shape,
        np.dtype(np.float32),  # not looked at: the type below counts
        kind.nbytes(shape),
        raw_dtype=module.GGMLQuantizationType(kind.number),
    )


def _padded(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT
