"""Codes as fields of 32-bit words: the order in which a GPU can unpack them with one shift a few fields.

A word holds `32 // bits` codes, none of which crosses it: 16, 10, 8, 6, 5, 4, 4 codes of 2 to 8 bits. The
codes of one word belong to one group, so its step is applied once a word. A group of `width` codes takes
`span = ceil(width / fields)` words, and field `j` of word `t` holds code `j * span + t`: for one field,
neighbouring words hold neighbouring inputs, and activations are read in runs. Rows begin at multiples of
`PITCH` words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.at_once import bands, weights_at_once
from auto_round.numerics.format import Format

WORD_BITS = 32

PITCH = 16
"""Rows are filled to a multiple of this many words, 64 bytes, so that every row can be read 16
bytes at a time."""

BAND = 1 << 18
"""Codes handled at a time on a CPU: the temporaries stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class BitFields:
    """Places of the codes of a matrix.

    Attributes:
        bits: width of a code.
        n_in: codes of a row.
        width: codes of a full group; the row's length where a group is at least a row.
    """

    bits: int
    n_in: int
    width: int

    @classmethod
    def of(cls, fmt: Format, n_in: int) -> BitFields:
        """Places of the codes of a format in rows of `n_in`."""
        return cls(fmt.grid.bits, n_in, fmt.group.width(n_in))

    @property
    def per_word(self) -> int:
        """Fields of a word."""
        return WORD_BITS // self.bits

    @property
    def span(self) -> int:
        """Words of a group."""
        return -(-self.width // self.per_word)

    @property
    def n_groups(self) -> int:
        """Groups of a row."""
        return -(-self.n_in // self.width)

    @property
    def n_words(self) -> int:
        """Words of a row that hold codes."""
        return self.n_groups * self.span

    @property
    def full(self) -> bool:
        """Whether every field of a row's words holds a code."""
        return self.n_words * self.per_word == self.n_in

    @property
    def pitch(self) -> int:
        """Words from one row to the next."""
        return -(-self.n_words // PITCH) * PITCH

    def pack(self, codes: Tensor) -> Tensor:
        """Codes `[out, in]` uint8 below `2**bits` as words `[out, pitch]` int32; empty fields are 0."""
        words = torch.zeros(codes.shape[0], self.pitch, dtype=torch.int32, device=codes.device)
        full = self.n_groups * self.width - self.n_in
        empty = self.per_word * self.span - self.width
        for rows in self._bands(codes):
            part = codes[rows]
            if full:
                part = torch.nn.functional.pad(part, (0, full))
            part = part.view(-1, self.n_groups, self.width)
            if empty:
                part = torch.nn.functional.pad(part, (0, empty))
            fields = part.view(-1, self.n_groups, self.per_word, self.span)
            word = fields[:, :, 0].to(torch.int32)
            for j in range(1, self.per_word):
                word.bitwise_or_(fields[:, :, j].to(torch.int32).bitwise_left_shift_(j * self.bits))
            words[rows, : self.n_words] = word.view(-1, self.n_words)
        return words

    def unpack(self, words: Tensor) -> Tensor:
        """Inverse of `pack`."""
        shape = (words.shape[0], self.n_in)
        codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
        mask = (1 << self.bits) - 1
        for rows in self._bands(codes):
            word = words[rows, : self.n_words].reshape(-1, self.n_groups, 1, self.span)
            fields = torch.cat(
                [(word >> (j * self.bits)).bitwise_and_(mask).to(torch.uint8) for j in range(self.per_word)],
                dim=2,
            )
            flat = fields.view(-1, self.n_groups, self.per_word * self.span)[..., : self.width]
            codes[rows] = flat.reshape(flat.shape[0], -1)[:, : self.n_in]
        return codes

    def _bands(self, codes: Tensor) -> Iterator[slice]:
        return bands(codes.shape[0], self.n_in, weights_at_once(codes.device, BAND))
