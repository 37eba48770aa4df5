"""The `torch` kernel: dequantize, then multiply; any device, any format, the reference for all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.kernels.kernel import LinearSpec, rounded_input
from auto_round.layouts.bits import WIDTHS, WORD, pack_bits, unpack_bits
from auto_round.numerics.at_once import weights_at_once
from auto_round.numerics.qtensor import QTensor, take_parts

BAND = 1 << 18
"""Weights dequantized at a time on a CPU, so that float32 temporaries stay in a core's cache."""

PART = "part_"
"""Prefix of the buffers that hold a scale's stored parts."""


@dataclass(frozen=True, slots=True)
class TorchKernel:
    """Weights stay packed in memory and are unpacked at every call.

    Exact: the result equals, bit for bit, `torch.nn.functional.linear(x, W, bias)` with `W` the weight
    dequantized in float32 and rounded once to the dtype of `x`.
    """

    name: str = "torch"

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None for every format whose codes are 2 to 8 bits wide."""
        if spec.fmt.grid.bits not in WIDTHS:
            return Refusal(self.name, f"holds codes of 2 to 8 bits, not {spec.fmt.grid.bits}")
        if not spec.dtype.is_floating_point:
            return Refusal(self.name, f"needs float activations, not {spec.dtype}")
        return None

    def compute_dtype(self, spec: LinearSpec) -> torch.dtype:
        """That of the activations."""
        return spec.dtype

    def prepare(self, q: QTensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        """Codes as a dense bit stream along the input, and the scale's parts as stored."""
        buffers = {PART + name: part for name, part in q.scale.parts.items()}
        if _packs(spec):
            return {"codes": pack_bits(q.codes, q.format.grid.bits), **buffers}
        return {"codes": q.codes, **buffers}

    def restore(self, buffers: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Inverse of `prepare`."""
        return _assemble(buffers["codes"], _parts(buffers), spec)

    def weight(self, buffers: Mapping[str, Tensor], spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        """Dequantized weight `[out, in]` in `dtype`."""
        codes = buffers["codes"]
        bands = [rows for rows, _ in spec.fmt.group.bands(spec.shape, weights_at_once(codes.device, BAND))]
        if len(bands) == 1:
            return spec.fmt.dequantize(self.restore(buffers, spec), dtype)
        w = torch.empty(spec.shape, dtype=dtype, device=codes.device)
        for rows in bands:
            parts = take_parts(spec.fmt, _parts(buffers), rows=rows)
            w[rows] = spec.fmt.dequantize(_assemble(codes[rows], parts, spec), dtype)
        return w

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias` with the weight dequantized to the dtype of `x`."""
        x = rounded_input(x, buffers, spec)
        w = self.weight(buffers, spec, spec.held or x.dtype)
        return torch.nn.functional.linear(x, w.to(x.dtype), bias)


def _parts(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scale's stored parts among the buffers."""
    return {name.removeprefix(PART): b for name, b in buffers.items() if name.startswith(PART)}


def _assemble(codes: Tensor, parts: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
    """Quantized tensor of codes as `prepare` keeps them and stored parts."""
    if _packs(spec):
        codes = unpack_bits(codes, spec.fmt.grid.bits)
    return QTensor(codes, spec.fmt.rule.read(parts), spec.fmt)


def _packs(spec: LinearSpec) -> bool:
    """Whether the codes of a row fill whole words; otherwise they are kept one a byte."""
    return spec.shape[1] * spec.fmt.grid.bits % WORD == 0
