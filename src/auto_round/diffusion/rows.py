"""Rows of calibration: what a component was called with for one caption at one denoising step, on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.checkpoint.disk import atomic_write_json, bytes_of, reading, writing

_LIST = "rows.json"
_TENSOR, _PAIR = "tensor", "tuple"


@dataclass(frozen=True, slots=True)
class RowEntry:
    """Where a row comes from.

    Attributes:
        caption: number of the caption.
        step: number of the denoising step.
        timestep: what the component is told of it.
        tree: its arguments as JSON, with names in place of tensors.
        digest: of the arguments.
    """

    caption: int
    step: int
    timestep: float
    tree: Any
    digest: str


class RowWriter:
    """Writes rows into a folder; they count once `finish` has listed them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: list[RowEntry] = []
        self._seen: set[str] = set()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, caption: int, step: int, timestep: float, inputs: Mapping[str, Any]) -> None:
        """Write one row; arguments as for `RowEntry`, `inputs` by the names of the component's parameters."""
        tensors: dict[str, Tensor] = {}
        tree = _taken_apart(dict(inputs), tensors)
        digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(bytes_of(torch.view_as_real(tensor) if tensor.is_complex() else tensor))
        entry = RowEntry(caption, step, timestep, tree, digest.hexdigest()[:16])
        if (
            entry.digest in self._seen
        ):  # an encoder reads "nothing" once for each caption, where there is guidance
            return
        self._seen.add(entry.digest)
        save_tensors(self._folder / _file(len(self._entries)), tensors)
        self._entries.append(entry)

    def finish(self) -> None:
        """List the rows; what is listed is whole."""
        atomic_write_json(self._folder / _LIST, {"rows": [asdict(entry) for entry in self._entries]})


class RecordedRows:
    """Rows in a folder, in the order in which they were written."""

    def __init__(self, folder: Path, entries: Sequence[RowEntry], numbers: Sequence[int]) -> None:
        self._folder, self.entries, self._numbers = folder, tuple(entries), tuple(numbers)

    @classmethod
    def open(cls, folder: Path) -> RecordedRows | None:
        """The rows of a folder; None where they were not all written."""
        path = folder / _LIST
        with reading(folder):
            if not path.is_file():
                return None
            entries = [RowEntry(**entry) for entry in json.loads(path.read_bytes())["rows"]]
        return cls(folder, entries, range(len(entries)))

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, row: int) -> dict[str, Any]:
        """Arguments of the component by name."""
        tensors = load_tensors(self._folder / _file(self._numbers[row]))
        inputs: dict[str, Any] = _put_together(self.entries[row].tree, tensors)
        return inputs

    def arranged(self, order: Sequence[int]) -> RecordedRows:
        """Some of the rows in another order."""
        entries = [self.entries[i] for i in order]
        return RecordedRows(self._folder, entries, [self._numbers[i] for i in order])

    @property
    def fingerprint(self) -> str:
        """Digest of all rows in their order."""
        return hashlib.sha256("".join(entry.digest for entry in self.entries).encode()).hexdigest()[:16]


def _file(number: int) -> str:
    return f"row-{number:06d}.safetensors"


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested arguments as JSON; tensors go to `tensors`, under numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, torch.Size | tuple):
        return {_PAIR: [_taken_apart(part, tensors) for part in value]}
    if isinstance(value, list):
        return [_taken_apart(part, tensors) for part in value]
    if isinstance(value, Mapping):
        return {"mapping": {str(key): _taken_apart(part, tensors) for key, part in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an argument of the component is a {type(value).__name__}")


def _put_together(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_put_together(part, tensors) for part in tree]
    if not isinstance(tree, Mapping):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _PAIR in tree:
        return tuple(_put_together(part, tensors) for part in tree[_PAIR])
    return {key: _put_together(part, tensors) for key, part in tree["mapping"].items()}
