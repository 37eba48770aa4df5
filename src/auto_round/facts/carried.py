"""What blocks hand on to later blocks beside hidden states: keys and values, choices of tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Path: TypeAlias = "tuple[Any, ...]"
"""Where a tensor lies in a value: keys of mappings and positions in tuples; empty for a tensor itself."""


@dataclass(frozen=True, slots=True)
class CarriedTensor:
    """One tensor of a value that blocks hand on, kept as `[rows, 1, numbers]` whatever its axes.

    Attributes:
        path: where it lies in the value.
        shape: of one row, without the axis of rows.
        axis: which axis counts rows.
        dtype: as blocks hand it on.
    """

    path: Path
    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """Numbers of a row."""
        return prod(self.shape)

    def room(self, hidden: Tensor) -> Tensor:
        """Zeros for as many rows as there are hidden states, on their device."""
        return hidden.new_zeros(hidden.shape[0], 1, self.numbers, dtype=self.dtype)

    def given(self, state: Tensor) -> Tensor:
        """The tensor with the axes that blocks read, from the form in which it is kept."""
        return state.reshape(-1, *self.shape).movedim(0, self.axis)

    def kept(self, tensor: Tensor) -> Tensor:
        """The tensor in the form in which it is kept, `[rows, 1, numbers]`."""
        moved = tensor.movedim(self.axis, 0)
        return moved.reshape(moved.shape[0], 1, self.numbers)


@dataclass(frozen=True, slots=True)
class Carried:
    """One value that blocks hand on, as one block meets it.

    Attributes:
        name: parameter of the block that takes it.
        place: place in the output of the block that gives it; None where blocks fill a mapping that they
            are given.
        empty: that mapping before the first block; None where there is none.
        pieces: all tensors that it holds behind the last block, in the order in which they are kept.
        present: which of them are there before this block runs.
    """

    name: str
    place: int | None
    empty: MutableMapping[Any, Any] | None
    pieces: tuple[CarriedTensor, ...]
    present: frozenset[Path]

    @property
    def paths(self) -> frozenset[Path]:
        """Where all pieces lie."""
        return frozenset(piece.path for piece in self.pieces)

    def given(self, states: Sequence[Tensor]) -> Any:
        """The value that the block takes, from its pieces as they are kept."""
        there = {
            piece.path: piece.given(state)
            for piece, state in zip(self.pieces, states, strict=True)
            if piece.path in self.present
        }
        value = copy.copy(self.empty)
        if value is None:
            return _built(there) if there else None
        for key in dict.fromkeys(path[0] for path in there):
            value[key] = _built({path[1:]: t for path, t in there.items() if path[0] == key})
        return value

    def handed(self, given: Any, output: Any, states: Sequence[Tensor]) -> list[Tensor]:
        """The pieces behind the block; one that the block did not give stays as it was.

        Args:
            given: the value that the block took.
            output: what the block returned.
            states: the pieces before it.
        """
        value = given if self.place is None else output[self.place]
        found = tensors_in(value)
        return [
            piece.kept(found[piece.path]) if piece.path in found else state
            for piece, state in zip(self.pieces, states, strict=True)
        ]


def tensors_in(value: Any, path: Path = ()) -> dict[Path, Tensor]:
    """Tensors of a value by where they lie: itself, or in mappings, tuples and lists."""
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, (tuple, list)):
        inside = enumerate(value)  # type: ignore[assignment]
    else:
        return {path: value} if hasattr(value, "movedim") else {}
    found: dict[Path, Tensor] = {}
    for key, part in inside:
        found |= tensors_in(part, (*path, key))
    return found


def _built(there: Mapping[Path, Tensor]) -> Any:
    """A tensor alone, or a tuple of what lies at positions."""
    if () in there:
        return there[()]
    count = 1 + max(path[0] for path in there)
    each = ({path[1:]: t for path, t in there.items() if path[0] == i} for i in range(count))
    return tuple(_built(inside) if inside else None for inside in each)
