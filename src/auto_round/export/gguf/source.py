"""A GGUF file as input: the tensors of a plain model, dequantized row by row as they are asked for.

Names and orders of rows are those of writing (`names.name_tensors`), undone. The configuration is read from
the file by Transformers and the table of families, or from a `config.json` beside it. What this package would
write for it is compared with what the file says, so that a setting which got lost is found.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.disk import bytes_of, read_at, reading, write_at
from auto_round.checkpoint.open_files import OpenFiles
from auto_round.errors import CheckpointError, ConfigError, Refusal, UnsupportedError
from auto_round.export.gguf.families import FAMILIES, Family, family_of
from auto_round.export.gguf.hyperparameters import hyperparameters
from auto_round.export.gguf.library import gguf
from auto_round.export.gguf.names import name_tensors
from auto_round.export.gguf.nvfp4 import KIND, number_of, scale_name
from auto_round.export.gguf.tensors import Change, GgufTensor, TensorRows
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.gguf import GGUF_BLOCKS
from auto_round.log import logger
from auto_round.models.config_facts import text_config
from auto_round.models.folder import FolderSource
from auto_round.models.skeleton import build_skeleton, read_model_config, saved_specs
from auto_round.schemes.condense import some

SUFFIX = ".gguf"
BAND = 1 << 20
"""Weights dequantized at a time."""
_SAMPLE = 4096
_HINT = (
    "put the config.json and the tokenizer of the original into a folder with the file, and give the folder"
)
_UNUSED = ("general.", "tokenizer.", "quantize.")
_CLOSE = 1e-6


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the file.

    Attributes:
        kind: name of its type, for example `q4_k`.
        shape: `[..., in]`.
        begin: offset of its bytes in the file.
        nbytes: how many there are.
    """

    kind: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows over all leading dimensions; 1 for a vector."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class OpenedGguf:
    """A file, and where its configuration and tokenizer lie.

    Attributes:
        file: the GGUF file.
        folder: folder of the configuration and the tokenizer.
        expanded: what holds that folder as long as it is needed; None for the user's own.
    """

    file: Path
    folder: Path
    expanded: tempfile.TemporaryDirectory[str] | None


class GgufTensors:
    """The tensors of a plain model over a GGUF file; see `checkpoint.tensors.Tensors`."""

    def __init__(
        self,
        opened: OpenedGguf,
        stored: Mapping[str, StoredTensor],
        places: Mapping[str, tuple[GgufTensor, TensorRows]],
        specs: Mapping[str, TensorSpec],
    ) -> None:
        """Remember what lies where.

        Args:
            opened: the file and its folder.
            stored: tensors of the file.
            places: tensor of the model -> the tensor of the file and its rows.
            specs: the model's tensors.
        """
        self._opened = opened
        self._stored = stored
        self._places = places
        self._specs = specs
        self._files = OpenFiles(os.O_RDONLY)
        self._scales = {
            name: self._bytes(there.begin, there.nbytes).view(torch.float32)
            for name, each in stored.items()
            if each.kind == KIND and (there := stored.get(scale_name(name)))
        }

    @property
    def folder(self) -> Path:
        """Folder of the configuration and the tokenizer."""
        return self._opened.folder

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names of the plain model."""
        return tuple(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a plain tensor."""
        return self._specs[name]

    def read(self, name: str) -> Tensor:
        """A plain tensor, in fresh memory.

        Raises:
            CheckpointError: the file ends early.
        """
        tensor, piece = self._places[name]
        spec, stored = self._specs[name], self._stored[tensor.name]
        # Norms are computed before they are rounded; all else is rounded at once, in half the memory.
        dtype = torch.float32 if tensor.change is Change.PLUS_ONE else spec.dtype
        start, count = (piece.start, piece.rows) if len(tensor.shape) > 1 else (0, 1)
        width, size = stored.shape[-1], stored.nbytes // stored.rows
        rows = torch.empty(count, width, dtype=dtype, device="cpu")
        number = number_of(self._scales, tensor, piece) if stored.kind == KIND else None
        step = max(1, BAND // width)
        for at in range(0, count, step):
            some_rows = min(step, count - at)
            octets = self._bytes(stored.begin + (start + at) * size, some_rows * size)
            octets = octets.reshape(some_rows, size)
            rows[at : at + some_rows] = numbers(octets, stored.kind, width, dtype, number)
        return tensor.restore(piece, rows).to(spec.dtype).reshape(spec.shape).contiguous()

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same in another dtype."""
        return self.read(name).to(dtype)

    def read_entry(self, name: str, index: int) -> Tensor:
        """One entry of a tensor's first axis."""
        return self.read(name)[index]

    def copy_into(self, name: str, fd: int, offset: int) -> None:
        """Write the bytes of a plain tensor to an open file."""
        write_at(fd, bytes_of(self.read(name)), offset)

    def fingerprint(self) -> str:
        """Hash of every tensor's name, type and shape, and of its first bytes."""
        digest = hashlib.sha256()
        for name, stored in self._stored.items():
            digest.update(f"{name}\0{stored.kind}\0{list(stored.shape)}\0".encode())
            digest.update(bytes_of(self._bytes(stored.begin, min(stored.nbytes, _SAMPLE))))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._files.close()

    def _bytes(self, begin: int, count: int) -> Tensor:
        octets = torch.empty(count, dtype=torch.uint8, device="cpu")
        file = self._opened.file
        with reading(file), self._files.use(file) as fd:
            done = read_at(fd, bytes_of(octets), begin)
        if done != count:
            raise CheckpointError(f"{file}: ends at offset {begin + done} inside of a tensor")
        return octets


def numbers(
    octets: Tensor, kind: str, width: int, dtype: torch.dtype, number: Tensor | None = None
) -> Tensor:
    """Numbers `[rows, width]` of rows of bytes; of types without a layout here by the `gguf` package.

    Args:
        octets: the rows.
        kind: name of their type.
        width: weights in a row.
        dtype: of the result.
        number: what the blocks are multiplied by, of NVFP4.
    """
    block = GGUF_BLOCKS.get(kind)
    if block is not None:
        parts = {"weight": octets} | ({} if number is None else {"scale": number})
        q = block.unpack(parts, block.format, (len(octets), width))
        return block.format.dequantize(q, dtype)
    module = gguf()
    found = module.quants.dequantize(octets.numpy(), module.GGMLQuantizationType[kind.upper()])
    return torch.from_numpy(found).to(dtype)


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means; None where it is a folder of another kind.

    Raises:
        ConfigError: several files in a folder.
    """
    if path.is_file():
        return path
    found = sorted(path.glob(f"*{SUFFIX}"))
    if not found or any(path.glob("*.safetensors")):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConfigError(f"{path} holds several GGUF files ({names}): give the path of one")
    return found[0]


def open_gguf(
    path: Path, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> FolderSource:
    """A model source over a GGUF file.

    Args:
        path: the file, or a folder with it and perhaps `config.json` and a tokenizer.
        trust_remote_code: run model code that lies in that folder.
        dtype: of the plain weights; None for that of `config.json`, else bfloat16.

    Raises:
        ConfigError: several files, or Transformers reads no configuration from it.
        CheckpointError: a damaged file, tensors that are missing or have no place.
        UnsupportedError: a family that is not in the table, or settings that the configuration lost.
    """
    file = gguf_file(path)
    if file is None:
        raise ConfigError(f"no GGUF file in {path}")
    beside = path.is_dir() and (path / "config.json").is_file()
    stored, metadata = read_head(file)
    expanded = None if beside else _expanded(file, metadata)
    folder = path if expanded is None else Path(expanded.name, file.stem)
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    kept = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16)
    skeleton = build_skeleton(config, kept, trust_remote_code=trust_remote_code)
    specs = {n: TensorSpec(kept, s.shape) for n, s in saved_specs(skeleton).items()}
    text, family = text_config(config), _family(config)
    _compare(file, hyperparameters(family, text), metadata)
    tensors = name_tensors(family, text, specs)
    _check(file, tensors, stored)
    places = {piece.source: (tensor, piece) for tensor in tensors for piece in tensor.pieces}
    found = {name: spec for name, spec in specs.items() if name in places}
    files = GgufTensors(OpenedGguf(file, folder, expanded), stored, places, found)
    return FolderSource.over(files, config, trust_remote_code=trust_remote_code, dtype=dtype)


def _family(config: Any) -> Family:
    """Row of the table for a configuration.

    Raises:
        UnsupportedError: there is none.
    """
    text = text_config(config)
    if text.model_type not in FAMILIES:
        raise UnsupportedError(
            f'GGUF files of model type "{text.model_type}" are not read',
            [Refusal("gguf", f"known are {', '.join(FAMILIES)}", "start from the original folder")],
        )
    return family_of(text)


def _expanded(file: Path, metadata: Mapping[str, Any]) -> tempfile.TemporaryDirectory[str]:
    """What holds a folder of the file's name, with its configuration and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(file.parent, **where)
    except (ValueError, KeyError, OSError, TypeError, ImportError) as error:
        raise ConfigError(f"cannot read the configuration in {file}: {error}; {_HINT}") from error
    family, text = _family(config), text_config(config)
    for key in family.keys:  # Transformers 5.24 leaves some out, such as the width of a head of Qwen 3
        if (name := f"{family.arch}.{key.name}") in metadata:
            own = next((attribute for attribute in key.sources if hasattr(text, attribute)), key.sources[0])
            setattr(text, own, metadata[name])
    config.dtype = torch.bfloat16
    expanded = tempfile.TemporaryDirectory(prefix="auto_round_")
    folder = Path(expanded.name, file.stem)
    config.save_pretrained(folder)
    try:
        AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)
    except (ValueError, KeyError, OSError, TypeError, ImportError, AttributeError) as error:
        logger.debug("%s: no tokenizer of Transformers comes from it: %s", file, error)
    return expanded


def read_head(file: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Tensors of a file, and its metadata.

    Raises:
        CheckpointError: it is no GGUF file, or a damaged one.
    """
    module = gguf()
    try:
        reader = module.GGUFReader(file)
        stored = {
            t.name: StoredTensor(
                t.tensor_type.name.lower(),
                tuple(int(n) for n in reversed(t.shape)),
                int(t.data_offset),
                int(t.n_bytes),
            )
            for t in reader.tensors
        }
        return stored, {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
        raise CheckpointError(f"{file} is no GGUF file, or a damaged one: {error}") from error


def _compare(file: Path, wanted: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Refuse a configuration that says something else than the file."""
    others = [
        f"{name} is {metadata[name]} in the file and {value.value} by the configuration"
        for name, value in wanted.items()
        if name in metadata and not name.startswith(_UNUSED) and not _same(metadata[name], value.value)
    ]
    if others:
        raise UnsupportedError(
            f"the configuration of {file} is not that of its file",
            [Refusal("gguf", other, _HINT) for other in others],
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=_CLOSE)
    return list(one) == list(other) if isinstance(one, list) else bool(one == other)


def _check(file: Path, tensors: Iterable[GgufTensor], stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a file that lacks tensors of the model, or has others."""
    wanted = {tensor.name: tensor for tensor in tensors}
    scales = {scale_name(name) for name, each in stored.items() if each.kind == KIND}
    wrong = {
        "lacks": [name for name, tensor in wanted.items() if tensor.pieces and name not in stored],
        "has tensors without a place in the model:": [
            name for name in stored if name not in wanted and name not in scales
        ],
        "has other shapes of": [
            name for name, t in wanted.items() if name in stored and stored[name].shape != tuple(t.shape)
        ],
    }
    for what, names in wrong.items():
        if names:
            raise CheckpointError(f"{file} {what} {some(names)}; its configuration asks for others: {_HINT}")
