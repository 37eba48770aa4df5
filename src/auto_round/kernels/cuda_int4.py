"""The `torch_int4` kernel: 2- to 4-bit weights through PyTorch's packed int4 matrices for CUDA (tinygemm).

`torch.ops.aten._weight_int4pack_mm` multiplies bfloat16 activations by `(code - 8) * step + fold`, with
step and fold in bfloat16, weights rounded to bfloat16 and sums in float32. It needs no package beside
PyTorch.

Source: PyTorch `aten/src/ATen/native/cuda/int4mm.cu`, 2.9 to 2.13. Not measured on a GPU by this version;
every kind of layer is tried before it is used (`kernels/check.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.kernels.int4_codes import CodePlanes, is_whole, packed_group
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.reference import PART
from auto_round.kernels.tiles import TileOrder
from auto_round.numerics.qtensor import QTensor

TILE_ROWS = 8
"""Outputs of a tile."""

INNER = (8, 4, 2)
"""Blocks of 16 inputs of a tile, best first."""

CAPABILITY = (8, 0)
"""Compute capability from which the operator runs."""


@dataclass(frozen=True, slots=True)
class CudaInt4Kernel:
    """Packed int4 matrices on a CUDA device; codes are kept exactly, steps are rounded to bfloat16."""

    name: str = "torch_int4"

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None for whole-number formats of 2 to 4 bits whose groups are multiples of 32, on a CUDA device."""
        if spec.device != "cuda":
            return Refusal(self.name, f"runs on cuda, not on {spec.device}")
        if not is_whole(spec.fmt) or spec.fmt.grid.bits > 4:
            return Refusal(self.name, f"holds whole numbers of 2 to 4 bits, not {spec.fmt.name}")
        if spec.dtype is not torch.bfloat16:
            return Refusal(self.name, f"takes bfloat16 activations, not {spec.dtype}")
        n_out, n_in = spec.shape
        if packed_group(spec.fmt, n_in) is None or _inner(n_in) is None or n_out % TILE_ROWS:
            width = spec.fmt.group.width(n_in)
            return Refusal(
                self.name,
                f"needs groups and rows of multiples of 32 and outputs of {TILE_ROWS}, "
                f"not groups of {width} in {list(spec.shape)}",
            )
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY:
            return Refusal(
                self.name, "needs a CUDA device of compute capability 8.0 or more, and none is here"
            )
        return None

    def compute_dtype(self, spec: LinearSpec) -> torch.dtype:
        """Always bfloat16."""
        return torch.bfloat16

    def prepare(self, q: QTensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        """Packed codes, `[n_groups, out, 2]` bfloat16 of step and fold, and the scale's parts as stored."""
        planes = CodePlanes.of(spec.fmt, spec.shape[1])
        codes = planes.split(q.codes, q.scale, slice(None))
        return {
            "packed": _pack(codes, _tile_inputs(spec)),
            "scale_zero": planes.scale_zero(q.scale, spec.shape[0]),
            **{PART + name: part for name, part in q.scale.parts.items()},
        }

    def restore(self, buffers: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Inverse of `prepare`."""
        packed = buffers["packed"]
        parts = {name.removeprefix(PART): b for name, b in buffers.items() if name.startswith(PART)}
        scale = spec.fmt.rule.read(parts)
        codes = _order(_tile_inputs(spec), packed.device).unpack(packed, spec.shape)
        return QTensor(CodePlanes.of(spec.fmt, spec.shape[1]).join(codes, scale), scale, spec.fmt)

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias` in bfloat16, sums in float32."""
        n_out, n_in = spec.shape
        if x.numel() == 0:  # the operator would launch no block, which is an error
            return x.new_empty(*x.shape[:-1], n_out)
        scale_zero = buffers["scale_zero"]
        flat = x.reshape(-1, n_in).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm(
            flat, buffers["packed"], n_in // scale_zero.shape[0], scale_zero
        )
        y = y.view(*x.shape[:-1], n_out)
        return y if bias is None else y + bias


def _inner(n_in: int) -> int | None:
    return next((inner for inner in INNER if n_in % (16 * inner) == 0), None)


def _tile_inputs(spec: LinearSpec) -> int:
    inner = _inner(spec.shape[1])
    if inner is None:
        raise ValueError(f"torch_int4 refuses rows of {spec.shape[1]}")
    return 16 * inner


def _pack(codes: Tensor, tile_inputs: int) -> Tensor:
    """The operator takes two codes a byte, the even input's in the upper half."""
    pairs = (codes[:, ::2] << 4).bitwise_or_(codes[:, 1::2])
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, tile_inputs // 16)
    return packed


@functools.cache
def _order(tile_inputs: int, device: torch.device) -> TileOrder:
    return TileOrder.read(
        lambda codes: _pack(codes, tile_inputs),
        (TILE_ROWS, tile_inputs),
        4,
        inputs_first=False,
        device=device,
    )
