"""Dense bit streams: `uint8` codes of 2 to 8 bits packed into `int32` words, and back.

The first code takes the lowest bits of the first word; codes of 3, 5, 6 and 7 bits run across words. For 2, 4
and 8 bits this is the word order of GPTQ, for 3 bits it is GPTQ's split of 32 codes over three words.

As many codes as fill whole bytes are the byte lanes of one whole number: two of 4 bits, four of 2 bits,
eight of an odd width. Merging neighbouring lanes until one is left makes their bits dense, which costs a few
vector instructions and works alike for every width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.errors import InternalError
from auto_round.layouts.compiled_bits import packs, unpacks
from auto_round.numerics.at_once import bands, weights_at_once

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
"""Widths of codes that can be packed, bits."""

WORD = 32
"""Bits in a word."""

BAND = 1 << 18
"""Codes handled at a time on a CPU, so that temporaries stay in a core's cache."""

_CARRIER = {2: torch.int32, 4: torch.int16}
"""Whole numbers of as many bytes as there are codes in a byte; others fill `bits` bytes with eight codes."""


def words(n_codes: int, bits: int) -> int:
    """Words that `n_codes` codes of `bits` bits take.

    Raises:
        InternalError: another width, or codes that do not fill whole words.
    """
    if bits not in WIDTHS:
        raise InternalError(f"codes of {bits} bits cannot be packed; expected one of {WIDTHS}")
    if n_codes * bits % WORD:
        raise InternalError(f"{n_codes} codes of {bits} bits do not fill whole {WORD}-bit words")
    return n_codes * bits // WORD


def pack_bits(codes: Tensor, bits: int, axis: int = -1) -> Tensor:
    """Pack codes along one axis.

    Args:
        codes: uint8, each below `2**bits`; never changed.
        bits: width of a code, 2 to 8.
        axis: axis of consecutive codes; `n * bits` must be a multiple of 32.

    Returns:
        int32, `n * bits / 32` words along `axis`, contiguous.

    Raises:
        InternalError: other widths or lengths.

    Exact: `unpack_bits(pack_bits(codes, bits), bits)` equals `codes`.
    """
    n_words = words(codes.shape[axis], bits)
    last = codes.movedim(axis, -1)
    flat = last.reshape(-1, last.shape[-1])
    packed = torch.empty(flat.shape[0], n_words, dtype=torch.int32, device=codes.device)
    _pack(flat, bits, packed)
    return packed.reshape(*last.shape[:-1], n_words).movedim(-1, axis).contiguous()


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along their rows, and lay the words of a row below each other.

    Args:
        codes: `[rows, n]` uint8, as for `pack_bits`.
        bits: width of a code, 2 to 8.

    Returns:
        int32 `[n * bits / 32, rows]`, contiguous: `pack_bits(codes, bits).t()`.

    Raises:
        InternalError: other widths or lengths.
    """
    packed = torch.empty(words(codes.shape[1], bits), len(codes), dtype=torch.int32, device=codes.device)
    _pack(codes, bits, packed.t())
    return packed


def _pack(flat: Tensor, bits: int, packed: Tensor) -> None:
    """`[rows, n]` uint8 -> `packed` `[rows, n * bits / 32]` int32, in any order of memory."""
    if packs(flat, bits, packed):
        return
    for rows in bands(len(flat), flat.shape[1], weights_at_once(flat.device, BAND)):
        part = torch.empty(packed[rows].shape, dtype=torch.int32, device=flat.device)
        _pack_rows(_aligned(flat[rows]), bits, part)
        packed[rows] = part


def unpack_bits(packed: Tensor, bits: int, axis: int = -1) -> Tensor:
    """Inverse of `pack_bits`.

    Args:
        packed: int32 words.
        bits: width of a code, 2 to 8.
        axis: axis of consecutive words; their bits must be a multiple of `bits`.

    Returns:
        uint8, `n_words * 32 / bits` codes along `axis`, contiguous.

    Raises:
        InternalError: words that do not hold a whole number of codes.
    """
    n_codes, rest = divmod(packed.shape[axis] * WORD, bits)
    if rest:
        raise InternalError(f"{packed.shape[axis]} words do not hold whole codes of {bits} bits")
    words(n_codes, bits)
    last = packed.movedim(axis, -1)
    flat = last.reshape(-1, last.shape[-1])
    codes = torch.empty(flat.shape[0], n_codes, dtype=torch.uint8, device=packed.device)
    if not unpacks(flat, bits, codes):
        for rows in bands(flat.shape[0], n_codes, weights_at_once(packed.device, BAND)):
            _unpack_rows(_aligned(flat[rows]), bits, codes[rows])
    return codes.reshape(*last.shape[:-1], n_codes).movedim(-1, axis).contiguous()


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, at an offset that allows a view of wider elements."""
    x = x.contiguous()
    # PyTorch calls a column contiguous whatever its stride, and views it as no wider.
    narrow = x.stride(-1) != 1
    at_odd = x.storage_offset() * x.element_size() % 8
    return x.clone(memory_format=torch.contiguous_format) if narrow or at_odd else x


def _merges(bits: int) -> tuple[torch.dtype, list[tuple[int, int, int]]]:
    """Whole numbers that carry the lanes, and for each merge: shift of the upper lane, masks of both."""
    carrier = _CARRIER.get(bits, torch.int64)
    wide = 8 * carrier.itemsize
    merges = []
    for lane in (8, 16, 32):
        if lane < wide:
            width = bits * lane // 8
            low = sum(((1 << width) - 1) << at for at in range(0, wide, 2 * lane))
            merges.append((lane - width, low, low << width))
    return carrier, merges


def _pack_rows(codes: Tensor, bits: int, packed: Tensor) -> None:
    """`[rows, n]` uint8 -> `packed`, contiguous `[rows, n * bits / 32]` int32."""
    if bits == 8:
        packed.copy_(codes.view(torch.int32))
        return
    carrier, merges = _merges(bits)
    x = codes.view(carrier)
    if bits in _CARRIER:  # what is left of upper lanes never reaches the lowest byte, so no masks are needed
        for shift, _, _ in merges:
            x = (x >> shift).bitwise_or_(x)
        packed.view(torch.uint8).copy_(x)
        return
    for shift, low, high in merges:
        x = (x >> shift).bitwise_and_(high).bitwise_or_(x & low)
    octets = x.view(torch.uint8).reshape(len(x), -1, 8)
    packed.view(torch.uint8).view(len(x), -1, bits).copy_(octets[..., :bits])


def _unpack_rows(packed: Tensor, bits: int, codes: Tensor) -> None:
    """`[rows, n * bits / 32]` int32 -> `codes`, contiguous `[rows, n]` uint8, in which lanes are parted."""
    octets = packed.view(torch.uint8)
    if bits == 8:
        codes.copy_(octets)
        return
    carrier, merges = _merges(bits)
    x = codes.view(carrier)
    if bits in _CARRIER:
        x.copy_(octets)
    else:
        wide = torch.nn.functional.pad(octets.reshape(len(packed), -1, bits), (0, 8 - bits))
        x.copy_(wide.view(carrier).squeeze(-1))
    for shift, low, high in reversed(merges):
        upper = (x & high).bitwise_left_shift_(shift)
        x.bitwise_and_(low).bitwise_or_(upper)
