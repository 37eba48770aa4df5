"""Weight files of a checkpoint folder: which there are, and which of them holds which tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from auto_round.checkpoint.disk import open_file, reading
from auto_round.checkpoint.header import MAX_JSON_BYTES, TensorInfo, parse_json_object, read_header
from auto_round.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """How a library calls the weight files of a folder.

    Attributes:
        stem: beginning of all their names.
    """

    stem: str

    @property
    def single(self) -> str:
        """The file that holds everything, where there is only one."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """The file that tells which shard holds which tensor."""
        return f"{self.single}.index.json"

    def shard(self, number: int, count: int) -> str:
        """File `number` of `count`, counted from 1."""
        if count == 1:
            return self.single
        return f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"

    @property
    def shards(self) -> str:
        """Pattern of the names of shards."""
        return f"{self.stem}-*-of-*.safetensors"


TRANSFORMERS = WeightFiles("model")
DIFFUSERS = WeightFiles("diffusion_pytorch_model")
"""Source: Transformers `utils.SAFE_WEIGHTS_NAME`, diffusers `utils.constants.SAFETENSORS_WEIGHTS_NAME`."""

SINGLE_FILE, INDEX_FILE = TRANSFORMERS.single, TRANSFORMERS.index


def read_file(file: Path) -> dict[str, TensorInfo]:
    """Checked header of one file."""
    if not file.is_file():
        raise CheckpointError(f"{file} is not a regular file (or a link to one that is gone); fetch it again")
    with reading(file):
        fd = open_file(file, os.O_RDONLY)
        try:
            return read_header(fd, file)
        finally:
            os.close(fd)


def read_shards(folder: Path, index_file: str = INDEX_FILE) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Checked headers of all shards that an index names, by their names, and where the index is wrong.

    What Transformers loads is read: every tensor of the shards, whatever the index says of it. Only where a
    tensor lies in several shards, the index decides.
    """
    index = folder / index_file
    named = _read_index(index)
    indexed: dict[str, list[str]] = {shard: [] for shard in sorted(named.values())}
    for name, shard in named.items():
        indexed[shard].append(name)
    shards = {shard: _read_shard(folder / shard, names) for shard, names in indexed.items()}
    tensors: dict[str, TensorInfo] = {}
    for shard, found in shards.items():
        for name, info in found.items():
            home = named.get(name, shard)
            if home == shard or name not in shards[home]:
                tensors.pop(name, None)
                tensors[name] = info
    cases = {
        "leaves out tensors that its shards hold, which are read all the same": tensors.keys() - named.keys(),
        "names another shard than the one that holds": {
            name for name, info in tensors.items() if name in named and info.file != folder / named[name]
        },
        "names tensors that no shard holds; a model that needs them is refused": named.keys()
        - tensors.keys(),
    }
    return tensors, tuple(f"{index} {what}: {_some(sorted(names))}" for what, names in cases.items() if names)


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> path of its shard below the folder."""
    with reading(index):
        if index.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{index}: longer than {MAX_JSON_BYTES} bytes")
        weight_map = parse_json_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    named: dict[str, str] = {}
    for name, shard in weight_map.items():
        path = PurePosixPath(shard) if isinstance(shard, str) else PurePosixPath("/")
        if path.suffix != ".safetensors" or path.is_absolute() or ".." in path.parts:
            raise CheckpointError(
                f'{index}: tensor "{name}" must lie in a *.safetensors beside it, got {shard!r}'
            )
        named[name] = str(path)
    return named


def _read_shard(file: Path, indexed: list[str]) -> dict[str, TensorInfo]:
    """Tensors of one shard, which should hold those that the index assigns to it."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it holds tensor {_some(indexed)}; fetch it again")
    return read_file(file)


def _some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    first, *others = names
    return f'"{first}"' + (f" and {len(others)} more" if others else "")
