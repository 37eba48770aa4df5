"""The order in which PyTorch packs int4 matrices on a CPU: it follows the instruction set, so it is probed.

A packed matrix is a row of blocks, each of `block` outputs and all inputs: `[in, block / 2]` bytes, every
byte two codes of the same input. Which two outputs share a byte follows from packing their numbers.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auto_round.compiled import addresses, numeric_library, threads_for
from auto_round.kernels.int4_codes import MIDDLE

BLOCKS = (64, 32, 16)
"""Outputs in a block, by instruction set: AVX-512, AVX2, others."""

SOURCE = Path(__file__).with_name("int4_order.c")

_PROBE_IN = 32
"""Inputs of the probe."""


@dataclass(frozen=True)
class Scratch:
    """Memory that `Order.weights` fills again and again: fresh pages cost as much as the arithmetic.

    Attributes:
        bits: int16 codes, a quarter as many as weights.
        weights: float32.
    """

    bits: Tensor
    weights: Tensor

    @classmethod
    def of(cls, count: int) -> Scratch:
        """Scratch for `count` weights."""
        return cls(
            torch.empty(count // 4, dtype=torch.int16, device="cpu"),
            torch.empty(count, dtype=torch.float32, device="cpu"),
        )


@dataclass(frozen=True)
class Order:
    """Order of codes in a block.

    Attributes:
        block: outputs in a block.
        outputs: output that each nibble of an input's bytes stands for, int64 `[block]`: first the low
            nibbles of even bytes, then of odd bytes, then the high nibbles of even, then of odd bytes.
        places: place of each output among `outputs`, int64 `[block]`.
    """

    block: int
    outputs: Tensor
    places: Tensor

    def unpack(self, packed: Tensor, n_in: int) -> Tensor:
        """Codes `[rows, in]` uint8 of a packed matrix of whole blocks."""
        nibbles = _nibbles(packed.reshape(-1, n_in, self.block // 2))
        return nibbles[..., self.places].transpose(1, 2).reshape(-1, n_in)

    def pack(self, codes: Tensor) -> Tensor:
        """Packed matrix `[rows, in / 2]` uint8 of codes `[rows, in]` below 16; whole blocks.

        The same bytes as PyTorch's operator makes, without its 32-bit input.
        """
        rows, n_in = codes.shape
        quarter = self.block // 4
        even_odd = self.outputs.view(2, 2, quarter).transpose(1, 2).reshape(2, -1)
        if (program := _program()) is not None:
            packed = torch.empty(rows, n_in // 2, dtype=torch.uint8, device="cpu")
            codes = codes.contiguous()
            sizes = map(ctypes.c_int64, (rows, n_in, self.block))
            places = (*addresses(codes, *even_odd), *sizes, *addresses(packed))
            program.auto_round_order_int4(*places, threads_for(codes.numel()))
            return packed
        blocks = codes.view(-1, self.block, n_in)
        pairs = blocks[:, even_odd[1]].bitwise_left_shift_(4).bitwise_or_(blocks[:, even_odd[0]])
        return pairs.transpose(1, 2).contiguous().view(rows, n_in // 2)

    def weights(self, packed: Tensor, scale_zero: Tensor, scratch: Scratch) -> Tensor:
        """Weights `[in, rows]` float32, with the outputs of a block in packed order.

        Args:
            packed: `[rows, in / 2]` uint8, whole blocks.
            scale_zero: `[n_groups, rows, 2]` bfloat16.
            scratch: memory for the result, overwritten by the next call.
        """
        n_in = packed.shape[1] * 2
        n_groups, rows, _ = scale_zero.shape
        n_blocks, quarter = rows // self.block, self.block // 4
        pairs = packed.reshape(-1).view(torch.int16).view(n_blocks, n_in, quarter)
        bits = scratch.bits[: rows * n_in // 4].view(n_blocks, n_in, quarter)
        w = scratch.weights[: rows * n_in].view(n_in, n_blocks, 4, quarter)
        for at, shift in enumerate((0, 8, 4, 12)):
            torch.bitwise_right_shift(pairs, shift, out=bits)
            w[:, :, at].copy_(bits.bitwise_and_(15).transpose(0, 1))
        pair = scale_zero.float().view(n_groups, n_blocks, self.block, 2)[:, :, self.outputs]
        step, fold = pair.reshape(n_groups, 1, rows, 2).unbind(-1)
        grouped = w.view(n_groups, n_in // n_groups, rows)
        torch.addcmul(fold - MIDDLE * step, grouped, step.contiguous(), out=grouped)
        return w.view(n_in, rows)

    def sort_outputs(self, y: Tensor) -> Tensor:
        """Results `[tokens, rows]` of packed-order columns in the order of outputs."""
        return y.view(y.shape[0], -1, self.block)[..., self.places].flatten(1)


def _program() -> ctypes.CDLL | None:
    """The compiled packing; None where it cannot be made."""
    return numeric_library(SOURCE, (), "4-bit matrices are packed without a compiled program")


def _nibbles(packed: Tensor) -> Tensor:
    """`[..., block / 2]` bytes -> `[..., block]` codes in the order of `Order.outputs`."""
    even, odd = packed[..., 0::2], packed[..., 1::2]
    return torch.cat([even & 15, odd & 15, even >> 4, odd >> 4], dim=-1)


@functools.cache
def find_order() -> Order | None:
    """Order of this machine's packed matrices; None when it is not one of blocks of outputs."""
    rows = 2 * BLOCKS[0]
    with torch.device("cpu"):  # models are built under another default device
        number = torch.arange(rows, device="cpu").unsqueeze(1).expand(rows, _PROBE_IN)
        probes = (number % 16, number // 16, torch.arange(_PROBE_IN, device="cpu").expand(rows, -1) % 16)
        packed = [_pack(codes) for codes in probes]
        return next(
            (
                order
                for block in BLOCKS
                if (order := _read_order(block, packed[0], packed[1])) is not None
                and all(
                    torch.equal(order.unpack(p, _PROBE_IN).long(), c)
                    for p, c in zip(packed, probes, strict=True)
                )
            ),
            None,
        )


def _read_order(block: int, low: Tensor, high: Tensor) -> Order | None:
    """Order of the outputs in a block, from packed outputs' numbers; None when it is no permutation."""
    shape = (-1, _PROBE_IN, block // 2)
    outputs = (_nibbles(low.view(shape)).long() + 16 * _nibbles(high.view(shape)).long())[0, 0]
    if not torch.equal(outputs.sort().values, torch.arange(block, device="cpu")):
        return None
    return Order(block, outputs, torch.argsort(outputs))


def _pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).contiguous(), 1)
    return packed
