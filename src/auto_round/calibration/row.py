"""One calibration row: what a model is called with, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import UnsupportedError
from auto_round.facts.model import MASK, TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationRow:
    """Inputs of a model for one row, and which of its positions count.

    Attributes:
        inputs: name of a model's argument -> its value for this row alone, as in a batch of one; `input_ids`
            `[1, length] int64` is among them.
        mask: `[length] bool`, False for padding that no loss may count; None: every position counts.
    """

    inputs: Mapping[str, Tensor]
    mask: Tensor | None = None

    @classmethod
    def of_tokens(cls, tokens: Tensor, mask: Tensor | None = None) -> CalibrationRow:
        """A row of text.

        Args:
            tokens: `[length] int64`.
            mask: `[length] bool`; None: all count.
        """
        inputs = {TOKENS: tokens.unsqueeze(0)}
        if mask is not None:
            inputs[MASK] = mask.unsqueeze(0)
        return cls(inputs, mask)

    @property
    def tokens(self) -> Tensor:
        """`[length] int64`."""
        return self.inputs[TOKENS][0]

    def __len__(self) -> int:
        """Number of positions."""
        return int(self.inputs[TOKENS].shape[1])

    @property
    def positions(self) -> int:
        """Number of positions that count."""
        return len(self) if self.mask is None else int(self.mask.sum())

    def beginning(self, length: int) -> CalibrationRow:
        """The first positions; inputs that do not have one number for each position stay whole."""
        cut = {
            name: x[:, :length] if x.dim() > 1 and x.shape[1] == len(self) else x
            for name, x in self.inputs.items()
        }
        return CalibrationRow(cut, None if self.mask is None else self.mask[:length])


def joined(rows: Sequence[CalibrationRow]) -> dict[str, Tensor]:
    """Inputs of several rows in one batch, joined along the first axis.

    Raises:
        UnsupportedError: rows have different inputs; a mask that some lack is full.
    """
    names = dict.fromkeys(name for row in rows for name in row.inputs)
    return {name: torch.cat([_input(row, name) for row in rows]) for name in names}


def masks_of(rows: Sequence[CalibrationRow]) -> Tensor | None:
    """Which positions count, `[rows, length]` bool; None where all do."""
    if all(row.mask is None for row in rows):
        return None
    whole = torch.ones_like(rows[0].tokens, dtype=torch.bool)
    return torch.stack([whole if row.mask is None else row.mask for row in rows])


def fingerprint(rows: Sequence[CalibrationRow]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of all inputs, and of the masks; hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        for name, value in sorted(row.inputs.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(_bytes(value))
        digest.update(b"-" if row.mask is None else b"+" + _bytes(row.mask))
    return digest.hexdigest()


def _input(row: CalibrationRow, name: str) -> Tensor:
    found = row.inputs.get(name)
    if found is not None:
        return found
    if name == MASK:
        return torch.ones_like(row.inputs[TOKENS], dtype=torch.bool)
    raise UnsupportedError(f'some calibration rows have the input "{name}" and others do not')


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
