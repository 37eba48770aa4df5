"""A second reader of floating weights in compressed-tensors folders, for the layout kit.

It shares no code with grids, scale rules and layouts: every code is cut out of one long whole number, and
every number is put together from its sign, exponent and mantissa.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

E8M0_BIAS = 127
"""Source: OCP Microscaling Formats (MX) 1.0, section 5.4.1."""


@dataclass(frozen=True, slots=True)
class Number:
    """A floating number of a few bits: sign, exponent, mantissa, from the highest bit down.

    Attributes:
        exponent: bits of the exponent; its bias is `2**(exponent - 1) - 1`.
        mantissa: bits of the mantissa.
    """

    exponent: int
    mantissa: int

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent + self.mantissa

    def of(self, code: int) -> float:
        """Number of a code."""
        fraction = code & ((1 << self.mantissa) - 1)
        power = code >> self.mantissa & ((1 << self.exponent) - 1)
        sign = -1.0 if code >> (self.bits - 1) & 1 else 1.0
        bias = (1 << (self.exponent - 1)) - 1
        if power == 0:
            return sign * math.ldexp(fraction, 1 - bias - self.mantissa)
        return sign * math.ldexp(fraction + (1 << self.mantissa), power - bias - self.mantissa)


FP4, FP6, FP8 = Number(2, 1), Number(2, 3), Number(4, 3)

STORED: Mapping[str, tuple[Number, str]] = {
    "mxfp4-pack-quantized": (FP4, "power"),
    "mxfp6-pack-quantized": (FP6, "power"),
    "mxfp8-quantized": (FP8, "power"),
    "float-quantized": (FP8, "float"),
    "nvfp4-pack-quantized": (FP4, "float8"),
}
"""`format` of a configuration -> its numbers, and what `weight_scale` holds.

Source: compressed-tensors 0.20, `compressors/{mxfp4,mxfp6,mxfp8,naive_quantized,nvfp4}/base.py`."""


def read_float_weight(
    parts: Mapping[str, Tensor], form: str, shape: Sequence[int], block: tuple[int, int]
) -> Tensor:
    """Weight `[out, in]` float32: code times scale, rounded once.

    Args:
        parts: stored tensors by suffix.
        form: `format` of the configuration, a key of `STORED`.
        shape: `[out, in]`.
        block: rows and columns that share a scale.
    """
    number, kind = STORED[form]
    n_out, n_in = shape
    octets = parts.get("weight_packed", parts.get("weight"))
    if octets is None:
        raise KeyError("neither weight_packed nor weight")
    rows = octets.view(torch.uint8).tolist()
    codes = torch.tensor([[number.of(code) for code in _codes(row, number.bits, n_in)] for row in rows])
    scale = _scales(parts, kind)
    if scale.numel() == 1:
        return codes * scale.reshape(())
    here = scale[torch.arange(n_out) // block[0]][:, torch.arange(n_in) // block[1]]
    return codes * here


def _codes(octets: Sequence[int], bits: int, count: int) -> list[int]:
    stream = sum(octet << (8 * i) for i, octet in enumerate(octets))
    return [stream >> (bits * i) & ((1 << bits) - 1) for i in range(count)]


def _scales(parts: Mapping[str, Tensor], kind: str) -> Tensor:
    """Scale of each block, float32."""
    stored = parts["weight_scale"]
    if kind == "power":
        return torch.tensor([[math.ldexp(1.0, e - E8M0_BIAS) for e in row] for row in stored.tolist()])
    if kind == "float":
        return stored.to(torch.float32)
    each = [[FP8.of(code) for code in row] for row in stored.view(torch.uint8).tolist()]
    return torch.tensor(each) / parts["weight_global_scale"].to(torch.float32)
