"""Fields of GGUF blocks: how codes and scales of a block lie in its bytes.

Source: llama.cpp `ggml-common.h` (structs `block_q4_0` ... `block_q6_K`) and the readers of gguf-py 0.19
`quants.py`. All numbers are little endian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CODES = "codes"
"""Name of the codes among the contents of a block; all other names are parts of the scale."""

Contents = Mapping[str, Tensor]
"""Codes and parts by name, `[rows, n_blocks, numbers in a block]`."""


class Field(Protocol):
    """Some bytes of a block."""

    @property
    def size(self) -> int:
        """Bytes in a block."""
        ...

    def pack(self, contents: Contents) -> Tensor:
        """Bytes `[rows, n_blocks, size]` uint8."""
        ...

    def unpack(self, octets: Tensor) -> dict[str, Tensor]:
        """What these bytes say; codes of several fields are to be joined by `or`."""
        ...


def _word_lanes(bits: int) -> int:
    """Mask of the low `bits` of each byte of an int64."""
    mask: int = sum(((1 << bits) - 1) << at for at in range(0, 64, 8))
    return mask - (1 << 64) if mask >> 63 else mask


@dataclass(frozen=True, slots=True)
class Planes:
    """Some bits of each code: byte `l` of a run holds those of codes `l`, `l + stride`, `l + 2 * stride`, ...

    Attributes:
        count: codes in a block.
        shift: lowest bit that is taken.
        width: bits that are taken: 1, 2 or 4.
        stride: bytes in a run.
    """

    count: int
    shift: int
    width: int
    stride: int

    @property
    def size(self) -> int:
        """Bytes in a block."""
        return self.count * self.width // 8

    def pack(self, contents: Contents) -> Tensor:
        """Cut the bits out of all codes."""
        codes = contents[CODES]
        runs = codes.reshape(*codes.shape[:-1], -1, 8 // self.width, self.stride)
        mask = (1 << self.width) - 1
        if self.stride % 8 == 0:  # eight bytes at a time; no bit leaves its byte
            runs, mask = runs.contiguous().view(torch.int64), _word_lanes(self.width)
        packed = (runs[..., 0, :] >> self.shift) & mask
        for k in range(1, 8 // self.width):
            packed |= ((runs[..., k, :] >> self.shift) & mask) << (k * self.width)
        return packed.view(torch.uint8).reshape(*codes.shape[:-1], self.size)

    def unpack(self, octets: Tensor) -> dict[str, Tensor]:
        """Codes with these bits only."""
        runs = octets.reshape(*octets.shape[:-1], -1, 1, self.stride)
        at = torch.arange(0, 8, self.width, dtype=torch.uint8, device=octets.device).reshape(-1, 1)
        codes = ((runs >> at) & ((1 << self.width) - 1)) << self.shift
        return {CODES: codes.reshape(*octets.shape[:-1], self.count)}


@dataclass(frozen=True, slots=True)
class SignedCodes:
    """8-bit codes as signed bytes: code 128 is the number 0."""

    size: int

    def pack(self, contents: Contents) -> Tensor:
        """Move the numbers from `0 ... 255` to `-128 ... 127`."""
        return contents[CODES] ^ 0x80

    def unpack(self, octets: Tensor) -> dict[str, Tensor]:
        """Codes of signed bytes."""
        return {CODES: octets ^ 0x80}


@dataclass(frozen=True, slots=True)
class Half:
    """One float16 number.

    Attributes:
        part: its name in `Scale.parts`.
    """

    part: str
    size: int = 2

    def pack(self, contents: Contents) -> Tensor:
        """Its two bytes."""
        return contents[self.part].contiguous().view(torch.uint8)

    def unpack(self, octets: Tensor) -> dict[str, Tensor]:
        """The number of two bytes."""
        return {self.part: octets.contiguous().view(torch.float16)}


@dataclass(frozen=True, slots=True)
class Octet:
    """One byte (MXFP4: the biased power of two), or one for each group of the block (NVFP4: E4M3 numbers).

    Attributes:
        part: its name in `Scale.parts`.
    """

    part: str
    size: int = 1

    def pack(self, contents: Contents) -> Tensor:
        """As it is."""
        return contents[self.part]

    def unpack(self, octets: Tensor) -> dict[str, Tensor]:
        """As it is."""
        return {self.part: octets}


@dataclass(frozen=True, slots=True)
class SignedBytes:
    """Multiples of 8 bits as signed bytes (Q6_K)."""

    part: str
    size: int

    def pack(self, contents: Contents) -> Tensor:
        """As they are."""
        return contents[self.part].contiguous().view(torch.uint8)

    def unpack(self, octets: Tensor) -> dict[str, Tensor]:
        """As they are."""
        return {self.part: octets.contiguous().view(torch.int8)}


@dataclass(frozen=True, slots=True)
class NibblePairs:
    """Multiples of 4 bits, `sc` in the low and `mn` in the high half of a byte (Q2_K)."""

    size: int

    def pack(self, contents: Contents) -> Tensor:
        """One byte a group."""
        return contents["sc"] | (contents["mn"] << 4)

    def unpack(self, octets: Tensor) -> dict[str, Tensor]:
        """Both halves."""
        return {"sc": octets & 15, "mn": octets >> 4}


@dataclass(frozen=True, slots=True)
class SixBitPairs:
    """Eight `sc` and eight `mn` of 6 bits in 12 bytes (Q4_K, Q5_K).

    The first four of each lie whole in bytes 0 ... 3 and 4 ... 7; of the last four the low nibbles share
    bytes 8 ... 11 and the upper two bits fill the tops of the first eight.
    """

    size: int = 12

    def pack(self, contents: Contents) -> Tensor:
        """Twelve bytes."""
        sc, sc_late = contents["sc"][..., :4], contents["sc"][..., 4:]
        mn, mn_late = contents["mn"][..., :4], contents["mn"][..., 4:]
        return torch.cat(
            [
                sc | ((sc_late >> 4) << 6),
                mn | ((mn_late >> 4) << 6),
                (sc_late & 15) | ((mn_late & 15) << 4),
            ],
            -1,
        )

    def unpack(self, octets: Tensor) -> dict[str, Tensor]:
        """Eight of each."""
        first, second, low = octets[..., :4], octets[..., 4:8], octets[..., 8:]
        return {
            "sc": torch.cat([first & 63, (low & 15) | ((first >> 6) << 4)], -1),
            "mn": torch.cat([second & 63, (low >> 4) | ((second >> 6) << 4)], -1),
        }


@dataclass(frozen=True, slots=True)
class SixBitSigned:
    """Sixteen signed `sc` of 6 bits, plus 32, in 12 bytes (Q3_K).

    Bytes 0 ... 7 hold the low nibbles of numbers 0 ... 7 and, above them, of 8 ... 15; byte `8 + j` holds the
    upper two bits of numbers `j`, `j + 4`, `j + 8`, `j + 12`.
    """

    size: int = 12

    def pack(self, contents: Contents) -> Tensor:
        """Twelve bytes."""
        sc = (contents["sc"] + 32).view(torch.uint8)
        low = (sc[..., :8] & 15) | ((sc[..., 8:] & 15) << 4)
        top = sc >> 4
        high = top[..., :4] | (top[..., 4:8] << 2) | (top[..., 8:12] << 4) | (top[..., 12:] << 6)
        return torch.cat([low, high], -1)

    def unpack(self, octets: Tensor) -> dict[str, Tensor]:
        """Sixteen numbers."""
        low, high = octets[..., :8], octets[..., 8:]
        nibbles = torch.cat([low & 15, low >> 4], -1)
        tops = torch.cat([(high >> at) & 3 for at in (0, 2, 4, 6)], -1)
        return {"sc": (nibbles | (tops << 4)).view(torch.int8) - 32}
