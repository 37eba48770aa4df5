"""One calibration row: what a model is called with, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import UnsupportedError
from auto_round.facts.model import MASK, TOKENS

OF_TOKENS = frozenset({TOKENS, MASK, "mm_token_type_ids", "token_type_ids", "cross_attention_mask"})
"""Inputs that have something for each token of a row; their shape does not tell: an image may have as many
patches as the row has tokens."""


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
    def beside_text(self) -> frozenset[str]:
        """Inputs other than tokens and their mask: images, sound, and what tells tokens of either apart."""
        return frozenset(self.inputs) - {TOKENS, MASK}

    @property
    def tokens(self) -> Tensor:
        """`[length] int64`."""
        return self.inputs[TOKENS][0]

    @property
    def identity(self) -> tuple[int, ...]:
        """What two rows of text have in common that differ by their padding only."""
        return tuple((self.tokens if self.mask is None else self.tokens[self.mask]).tolist())

    def __len__(self) -> int:
        """Number of positions."""
        return int(self.inputs[TOKENS].shape[1])

    @property
    def positions(self) -> int:
        """Number of positions that count."""
        return len(self) if self.mask is None else int(self.mask.sum())

    def beginning(self, length: int) -> CalibrationRow:
        """The first positions; a row with images stays whole, for its tokens must fit the images."""
        if self.beside_text:
            return self
        cut = {
            name: x[:, :length] if x.dim() > 1 and x.shape[1] == len(self) else x
            for name, x in self.inputs.items()
        }
        return CalibrationRow(cut, None if self.mask is None else self.mask[:length])

    def padded(self, length: int, padding: int) -> CalibrationRow:
        """The row with positions behind its last that do not count.

        Args:
            length: of the result.
            padding: token that fills it; other inputs with a number for each position get zeros.
        """
        more = length - len(self)
        if more <= 0:
            return self
        inputs = {
            name: _lengthened(x, more, padding * (name == TOKENS)) if name in OF_TOKENS else x
            for name, x in self.inputs.items()
        }
        mask = torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask
        mask = torch.cat([mask, mask.new_zeros(more)])
        return CalibrationRow({**inputs, MASK: mask.unsqueeze(0)}, mask)


def of_one_length(rows: Sequence[CalibrationRow], padding: int) -> tuple[CalibrationRow, ...]:
    """The rows, the shorter ones padded to the length of the longest."""
    longest = max(map(len, rows))
    return tuple(row.padded(longest, padding) for row in rows)


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


def _lengthened(x: Tensor, more: int, value: int) -> Tensor:
    """`[1, length, ...]` with more positions."""
    return torch.cat([x, x.new_full((1, more, *x.shape[2:]), value)], 1)


def _input(row: CalibrationRow, name: str) -> Tensor:
    found = row.inputs.get(name)
    if found is not None:
        return found
    if name == MASK:
        return torch.ones_like(row.inputs[TOKENS], dtype=torch.bool)
    raise UnsupportedError(f'some calibration rows have the input "{name}" and others do not')


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
