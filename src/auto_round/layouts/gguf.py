"""GGUF order: every row is a string of blocks, each with its scales and the codes of its weights.

One tensor, `weight`: `[out, in / weights in a block * bytes of a block]` uint8, the rows of the tensor as
they lie in the file. NVFP4 has a second one, `scale` `[1]` float32, that its blocks are multiplied by.
Source: `_generate_nvfp4_tensors` of llama.cpp's converter (`conversion/base.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.gguf_fields import (
    CODES,
    Field,
    Half,
    NibblePairs,
    Octet,
    Planes,
    SignedBytes,
    SignedCodes,
    SixBitPairs,
    SixBitSigned,
)
from auto_round.layouts.integers import check_parts
from auto_round.numerics.at_once import bands
from auto_round.numerics.format import Format
from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.numerics.qtensor import QTensor

BAND = 1 << 20
"""Weights packed at a time, so that temporaries stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class GGUFBlocks:
    """Blocks of one type.

    Attributes:
        name: name of the layout, for example `gguf_q4_k`.
        format: what blocks of this type hold.
        weights: weights in a block.
        fields: fields of a block in their order.
    """

    name: str
    format: Format
    weights: int
    fields: tuple[Field, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(field.size for field in self.fields)

    def accepts(self, fmt: Format, shape: Sequence[int]) -> Refusal | None:
        """None for matrices in this type's own format whose rows are whole blocks."""
        own = self.format
        if (fmt.grid, fmt.group, fmt.rule) != (own.grid, own.group, own.rule):
            return Refusal(self.name, f"holds {own.name}, not {fmt.name}")
        if len(shape) != 2:
            return Refusal(self.name, f"holds matrices [out, in], not shape {list(shape)}")
        if shape[1] % self.weights:
            return Refusal(self.name, f"needs rows of whole blocks of {self.weights}, not {shape[1]} inputs")
        return None

    def spec(self, fmt: Format, shape: Sequence[int]) -> Mapping[str, TensorSpec]:
        """The one tensor of bytes."""
        n_out, n_in = shape
        blocks = {"weight": TensorSpec(torch.uint8, (n_out, n_in // self.weights * self.block_bytes))}
        return blocks | {name: TensorSpec(fmt.rule.stored[part].dtype, (1,)) for part, name in _outside(fmt)}

    def pack(self, q: QTensor) -> Mapping[str, Tensor]:
        """Bytes of a quantized weight."""
        n_out, n_in = q.shape
        blocks = n_in // self.weights
        octets = torch.empty(n_out, blocks, self.block_bytes, dtype=torch.uint8, device=q.codes.device)
        for band in bands(n_out, n_in, BAND):
            inside = {name: part for name, part in q.scale.parts.items() if name not in q.format.shared}
            contents = {CODES: q.codes[band], **{name: part[band] for name, part in inside.items()}}
            contents = {name: x.reshape(len(x), blocks, -1) for name, x in contents.items()}
            torch.cat([field.pack(contents) for field in self.fields], -1, out=octets[band])
        outside = {name: q.scale.parts[part].reshape(1) for part, name in _outside(q.format)}
        return {"weight": octets.reshape(n_out, -1)} | outside

    def unpack(self, parts: Mapping[str, Tensor], fmt: Format, shape: Sequence[int]) -> QTensor:
        """Inverse of `pack`.

        Raises:
            CheckpointError: a tensor that `pack` would not have written.
        """
        check_parts(self.name, parts, self.spec(fmt, shape))
        n_out, n_in = shape
        octets = parts["weight"].reshape(n_out, -1, self.block_bytes)
        pieces = [self._contents(octets[rows]) for rows in bands(n_out, n_in, BAND)]
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        codes = joined.pop(CODES)
        joined |= {part: parts[name].reshape(1, 1) for part, name in _outside(fmt)}
        return QTensor(codes, fmt.rule.read({name: joined[name] for name in fmt.rule.stored}), fmt)

    def _contents(self, octets: Tensor) -> dict[str, Tensor]:
        """Codes and parts `[rows, numbers in a row]` of the bytes of some rows."""
        contents: dict[str, Tensor] = {}
        start = 0
        for field in self.fields:
            piece = octets[..., start : start + field.size]
            start += field.size
            for name, value in field.unpack(piece).items():
                contents[name] = value | contents[name] if name in contents else value
        return {name: value.reshape(len(octets), -1) for name, value in contents.items()}


def _outside(fmt: Format) -> list[tuple[str, str]]:
    """Parts of the scale that belong to the whole matrix, and the tensors that hold them."""
    return [(part, "scale") for part in fmt.shared]


def _blocks(name: str, weights: int, *fields: Field) -> GGUFBlocks:
    return GGUFBlocks(f"gguf_{name}", GGUF_FORMATS[name], weights, fields)


_FIFTH_BITS = Planes(32, 4, 1, 1)
_NIBBLES = Planes(32, 0, 4, 16)
_K_PAIRS = Planes(256, 0, 2, 32)
_K_NIBBLES = Planes(256, 0, 4, 32)

GGUF_BLOCKS: dict[str, GGUFBlocks] = {
    "q4_0": _blocks("q4_0", 32, Half("step"), _NIBBLES),
    "q4_1": _blocks("q4_1", 32, Half("step"), Half("min"), _NIBBLES),
    "q5_0": _blocks("q5_0", 32, Half("step"), _FIFTH_BITS, _NIBBLES),
    "q5_1": _blocks("q5_1", 32, Half("step"), Half("min"), _FIFTH_BITS, _NIBBLES),
    "q8_0": _blocks("q8_0", 32, Half("step"), SignedCodes(32)),
    "q2_k": _blocks("q2_k", 256, NibblePairs(16), _K_PAIRS, Half("d"), Half("dmin")),
    "q3_k": _blocks("q3_k", 256, Planes(256, 2, 1, 32), _K_PAIRS, SixBitSigned(), Half("d")),
    "q4_k": _blocks("q4_k", 256, Half("d"), Half("dmin"), SixBitPairs(), _K_NIBBLES),
    "q5_k": _blocks("q5_k", 256, Half("d"), Half("dmin"), SixBitPairs(), Planes(256, 4, 1, 32), _K_NIBBLES),
    "q6_k": _blocks(
        "q6_k", 256, Planes(256, 0, 4, 64), Planes(256, 4, 2, 32), SignedBytes("sc", 16), Half("d")
    ),
    "mxfp4": _blocks("mxfp4", 32, Octet("exponent"), _NIBBLES),
    "nvfp4": _blocks("nvfp4", 64, Octet("block", 4), Planes(64, 0, 4, 8)),
}
"""Layouts of GGUF blocks by the name of their format."""
