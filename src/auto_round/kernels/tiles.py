"""Inverse of operators that permute the codes of each tile of a matrix, read from what they do.

Operators for matrix units (tinygemm, Marlin) store tiles one after another and permute the codes inside.
What saving a loaded model needs is the way back. It is found by packing the numbers of the places, digit by
digit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TileOrder:
    """Order of the codes of a tile.

    Attributes:
        rows: outputs of a tile.
        columns: inputs of a tile.
        inputs_first: whether tiles of neighbouring outputs (and equal inputs) follow one another in memory;
            otherwise those of neighbouring inputs do.
        bits: width of a code, 4 or 8.
        places: place in the packed tile of each code of the tile, row by row, int64 `[rows * columns]`.
    """

    rows: int
    columns: int
    inputs_first: bool
    bits: int
    places: Tensor

    @classmethod
    def read(
        cls,
        pack: Callable[[Tensor], Tensor],
        tile: tuple[int, int],
        bits: int,
        *,
        inputs_first: bool,
        device: torch.device,
    ) -> TileOrder:
        """Read the order of an operator.

        Args:
            pack: codes `[rows, columns]` uint8 of one tile -> packed words of any whole-number dtype.
            tile: `(rows, columns)`.
            bits: width of a code.
            inputs_first: see the class.
            device: where the operator runs.

        Raises:
            ValueError: what the operator makes is no permutation of the codes.
        """
        count = tile[0] * tile[1]
        number = torch.arange(count, device=device)
        base, found, factor = 1 << bits, torch.zeros(count, dtype=torch.int64, device=device), 1
        while factor < count:
            digit = (number // factor % base).to(torch.uint8).view(tile)
            fields = _fields(pack(digit), bits)
            if fields.numel() != count:
                raise ValueError(f"{fields.numel()} codes of a packed tile, expected {count}")
            found += fields.long() * factor
            factor *= base
        if not torch.equal(found.sort().values, number):
            raise ValueError("the operator does not permute the codes of a tile")
        return cls(*tile, inputs_first, bits, torch.argsort(found))

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Codes `[out, in]` uint8 of a packed matrix of that shape."""
        down, across = shape[0] // self.rows, shape[1] // self.columns
        tiles = _fields(packed, self.bits).view(-1, self.rows * self.columns)[
            :, self.places.to(packed.device)
        ]
        if self.inputs_first:
            tiles = tiles.view(across, down, self.rows, self.columns).permute(1, 2, 0, 3)
        else:
            tiles = tiles.view(down, across, self.rows, self.columns).permute(0, 2, 1, 3)
        return tiles.reshape(shape)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Codes of packed words from the lowest bits on, uint8, flat."""
    octets = packed.contiguous().view(torch.uint8).flatten()
    return octets if bits == 8 else torch.stack([octets & 15, octets >> 4], dim=1).flatten()
