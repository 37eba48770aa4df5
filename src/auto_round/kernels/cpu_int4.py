"""The `cpu_int4` kernel: 2- to 4-bit weights through PyTorch's packed int4 matrices for CPUs.

`torch.ops.aten._weight_int4pack_mm_for_cpu` multiplies by `(code - 8) * step + fold`, with step and fold in
the dtype of the activations, codes unpacked in registers and sums in float32. Only its bfloat16 form is
vectorised on x86 (8192 x 4096, one token, one thread of a Xeon with AVX-512: 2.3 ms, against 51 ms in
float32, 82 ms in float16 and 5.3 ms for a bfloat16 matrix), hence everything is computed in bfloat16 here.

Its cost grows with every token, since weights are converted again for each. From `DENSE_TOKENS` tokens on,
bands of the weight are unpacked to bfloat16 once and multiplied as ordinary matrices.

Source: PyTorch `aten/src/ATen/native/cpu/int4mm_kernel.cpp`, 2.9 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.kernels import int4_codes
from auto_round.kernels.int4_order import Order, Scratch, find_order
from auto_round.kernels.kernel import LinearSpec
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import Scale

GROUPS = (256, 128, 64, 32)
"""Group widths that the operator takes; wider groups repeat their step."""

DENSE_TOKENS = 64
"""Tokens from which unpacking to bfloat16 is faster than the operator."""

DENSE_BAND = 1 << 19
"""Weights unpacked to bfloat16 at a time: with scratch 2 MiB, a core's second-level cache."""

PACK_BAND = 1 << 20
"""Weights packed at a time; bounds the int32 temporary to 4 MiB."""


@dataclass(frozen=True, slots=True)
class CpuInt4Kernel:
    """Packed int4 matrices on a CPU.

    Codes are kept exactly, 2- and 3-bit ones included. Steps are rounded to bfloat16 (and, for asymmetric
    4-bit weights, the product of step and zero point), activations of other dtypes too: see
    `Kernel.compute_dtype` for the bound. The steps as stored are kept beside them so that a loaded model can
    be saved unchanged.
    """

    name: str = "cpu_int4"

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None for whole-number formats of 2 to 4 bits whose groups are multiples of 32, on a CPU."""
        if spec.device != "cpu":
            return Refusal(self.name, f"runs on a CPU, not on {spec.device}")
        if not int4_codes.fits(spec.fmt):
            return Refusal(self.name, f"holds whole numbers of 2 to 4 bits, not {spec.fmt.name}")
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return Refusal(self.name, f"takes bfloat16, float16 or float32 activations, not {spec.dtype}")
        n_in = spec.shape[1]
        if _group(spec) is None:
            width = spec.fmt.group.width(n_in)
            return Refusal(self.name, f"needs groups and rows of multiples of 32, not {width} and {n_in}")
        if find_order() is None:
            return Refusal(self.name, "this PyTorch packs int4 matrices in an order that is not known")
        return None

    def compute_dtype(self, spec: LinearSpec) -> torch.dtype:
        """Always bfloat16."""
        return torch.bfloat16

    def prepare(self, q: QTensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        """Packed codes, `[n_groups, out, 2]` bfloat16 of step and fold, and the scale's parts as stored."""
        order, width = _order(), _width(spec)
        n_out, n_in = spec.shape
        rows = -(-n_out // order.block) * order.block
        packed = torch.zeros(rows, n_in // 2, dtype=torch.uint8)
        for band in _bands(n_out, order.block, PACK_BAND // n_in):
            codes = int4_codes.to_int4(q.codes[band], _rows(q.scale, band, spec), spec.fmt)
            missing = -codes.shape[0] % order.block
            codes = torch.nn.functional.pad(codes, (0, 0, 0, missing), value=int4_codes.MIDDLE)
            packed[band.start : band.start + codes.shape[0]] = (
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
            )
        scale_zero = torch.zeros(n_in // width, rows, 2, dtype=torch.bfloat16)
        scale_zero[:, :n_out] = _scale_zero(q.scale, spec, width)
        return {
            "packed": packed,
            "scale_zero": scale_zero,
            **{f"part_{k}": p for k, p in q.scale.parts.items()},
        }

    def restore(self, buffers: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Inverse of `prepare`."""
        n_out, n_in = spec.shape
        parts = {name.removeprefix("part_"): b for name, b in buffers.items() if name.startswith("part_")}
        scale = spec.fmt.rule.read(parts)
        codes = _order().unpack(buffers["packed"], n_in)[:n_out]
        return QTensor(int4_codes.from_int4(codes, scale, spec.fmt), scale, spec.fmt)

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias`, computed in bfloat16 with sums in float32."""
        n_out, n_in = spec.shape
        packed, scale_zero = buffers["packed"], buffers["scale_zero"]
        flat = x.reshape(-1, n_in).to(torch.bfloat16)
        if flat.shape[0] < DENSE_TOKENS:
            width = n_in // scale_zero.shape[0]
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat.contiguous(), packed, width, scale_zero
            )
        else:
            y = _dense(flat, packed, scale_zero)
        if y.shape[1] != n_out:
            y = y[:, :n_out]
        y = y.reshape(*x.shape[:-1], n_out).to(x.dtype)
        return y if bias is None else y + bias


def _group(spec: LinearSpec) -> int | None:
    """Widest group of the operator that tiles the groups of a weight; None when there is none."""
    n_in = spec.shape[1]
    width = spec.fmt.group.width(n_in)
    return next((g for g in GROUPS if width % g == 0 and n_in % g == 0), None)


def _width(spec: LinearSpec) -> int:
    width = _group(spec)
    if width is None:
        raise ValueError(f"cpu_int4 refuses groups of {spec.fmt.name} in rows of {spec.shape[1]}")
    return width


def _order() -> Order:
    order = find_order()
    if order is None:
        raise ValueError("cpu_int4 refuses a PyTorch whose order of packed int4 matrices is not known")
    return order


def _bands(n_out: int, block: int, rows: int) -> Iterator[slice]:
    """Slices of whole blocks of about `rows` rows."""
    step = max(block, rows // block * block)
    return (slice(start, min(start + step, n_out)) for start in range(0, n_out, step))


def _rows(scale: Scale, band: slice, spec: LinearSpec) -> Scale:
    """Scale of some rows; one scale for a whole tensor is that of every row."""
    step, zero = scale.step, scale.zero
    if spec.fmt.group.size == 0:
        return scale
    return Scale(step[band], None if zero is None else zero[band])


def _scale_zero(scale: Scale, spec: LinearSpec, width: int) -> Tensor:
    """Step and fold of each group of the operator, `[n_groups, out, 2]` bfloat16.

    The fold is a multiple of the rounded step, so that a weight near zero keeps a small error.
    """
    step = scale.step.to(torch.bfloat16)
    units = int4_codes.fold_units(scale, spec.fmt)
    fold = torch.zeros_like(step) if units is None else (units * step.float()).to(torch.bfloat16)
    pair = torch.stack([step, fold], dim=-1)
    n_out, n_in = spec.shape
    repeats = spec.fmt.group.width(n_in) // width
    pair = pair.expand(n_out, -1, -1).repeat_interleave(repeats, dim=1)[:, : n_in // width]
    return pair.transpose(0, 1)


def _dense(x: Tensor, packed: Tensor, scale_zero: Tensor) -> Tensor:
    """`[tokens, in]` times the packed weight, unpacked band by band to bfloat16; `[tokens, rows]`."""
    order = _order()
    n_in = x.shape[1]
    y = torch.empty(x.shape[0], packed.shape[0], dtype=torch.bfloat16)
    rows = max(order.block, DENSE_BAND // n_in // order.block * order.block)
    scratch = Scratch.of(rows * n_in)
    for band in _bands(packed.shape[0], order.block, rows):
        w = order.columns(packed[band], scale_zero[:, band], scratch)
        y[:, band] = order.sort_outputs(x @ w)
    return y
