"""The `cpu_int4` and `cpu_int8` kernels: whole numbers through PyTorch's packed int4 matrices for CPUs.

`torch.ops.aten._weight_int4pack_mm_for_cpu` multiplies by `(code - 8) * step + fold`, with step and fold in
the dtype of the activations, codes unpacked in registers and sums in float32. Only its bfloat16 form is
vectorised on x86 (8192 x 4096, one token, one thread of a Xeon with AVX-512: 2.3 ms, against 51 ms in
float32, 82 ms in float16 and 5.3 ms for a bfloat16 matrix), hence everything is computed in bfloat16 here.
Codes of 5 to 8 bits are two such matrices side by side (`kernels/int4_codes.py`).

Its cost grows with every token, since weights are converted again for each. From `dense_tokens` tokens on,
bands of the weight are unpacked once and multiplied as ordinary matrices.

Source: PyTorch `aten/src/ATen/native/cpu/int4mm_kernel.cpp`, 2.9 to 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.kernels.int4_codes import MIDDLE, CodePlanes, is_whole, packed_group
from auto_round.kernels.int4_order import Order, Scratch, find_order
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.operators import register_operator
from auto_round.kernels.reference import PART
from auto_round.numerics.at_once import bands
from auto_round.numerics.qtensor import QTensor

DENSE_TOKENS_BF16 = 64
"""Tokens from which unpacking is faster than the operator where the CPU multiplies
bfloat16 matrices itself."""

DENSE_TOKENS = 128
"""The same for other CPUs, which multiply float32 matrices 4 times as fast as bfloat16
ones: for 8 million weights on one thread of a Xeon with AVX-512 the operator takes 0.26 ms a token,
unpacking 17 ms and 0.12 ms a token."""

DENSE_BAND = 1 << 19
"""Weights unpacked at a time: with scratch 2.5 MiB, near a core's second-level cache."""

PACK_BAND = 1 << 20
"""Weights packed at a time; bounds temporaries to 2 MiB."""

MULTIPLIES_BF16 = bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
"""Whether this CPU has instructions for products of bfloat16 matrices; a constant, since
`torch.compile` cannot trace the question."""


@dataclass(frozen=True, slots=True)
class CpuIntKernel:
    """Packed int4 matrices on a CPU.

    Codes are kept exactly. Steps are rounded to bfloat16 (and, for asymmetric 4- and 8-bit weights, the
    product of step and zero point), activations of other dtypes too: see `Kernel.compute_dtype` for the
    bound. The steps as stored are kept beside them so that a loaded model can be saved unchanged.

    Attributes:
        name: name in the table.
        widths: widths of codes, bits.
    """

    name: str = "cpu_int4"
    widths: tuple[int, ...] = (2, 3, 4)

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None for whole-number formats of these widths whose groups are multiples of 32, on a CPU."""
        if spec.device != "cpu":
            return Refusal(self.name, f"runs on a CPU, not on {spec.device}")
        if not is_whole(spec.fmt) or spec.fmt.grid.bits not in self.widths:
            known = f"{self.widths[0]} to {self.widths[-1]}"
            return Refusal(self.name, f"holds whole numbers of {known} bits, not {spec.fmt.name}")
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return Refusal(self.name, f"takes bfloat16, float16 or float32 activations, not {spec.dtype}")
        n_in = spec.shape[1]
        if packed_group(spec.fmt, spec.shape[1]) is None:
            width = spec.fmt.group.width(n_in)
            return Refusal(self.name, f"needs groups and rows of multiples of 32, not {width} and {n_in}")
        if find_order() is None:
            return Refusal(self.name, "this PyTorch packs int4 matrices in an order that is not known")
        return None

    def compute_dtype(self, spec: LinearSpec) -> torch.dtype:
        """Always bfloat16."""
        return torch.bfloat16

    def prepare(self, q: QTensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        """Packed codes, bfloat16 step and fold of each plane's groups, and the scale's parts as stored."""
        order, planes = _order(), CodePlanes.of(spec.fmt, spec.shape[1])
        n_out, n_in = spec.shape
        rows = -(-n_out // order.block) * order.block
        packed = torch.empty(rows, planes.count * n_in // 2, dtype=torch.uint8, device="cpu")
        for band in bands(n_out, n_in, PACK_BAND, order.block):
            codes = planes.split(q.codes[band], q.scale, band)
            missing = -codes.shape[0] % order.block
            if missing:
                codes = torch.nn.functional.pad(codes, (0, 0, 0, missing), value=MIDDLE)
            packed[band.start : band.start + codes.shape[0]] = order.pack(codes)
        scale_zero = planes.scale_zero(q.scale, n_out)
        if rows != n_out:
            scale_zero = torch.nn.functional.pad(scale_zero, (0, 0, 0, rows - n_out))
        return {"packed": packed, "scale_zero": scale_zero, **{PART + k: p for k, p in q.scale.parts.items()}}

    def restore(self, buffers: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Inverse of `prepare`."""
        n_out, n_in = spec.shape
        planes = CodePlanes.of(spec.fmt, spec.shape[1])
        parts = {name.removeprefix(PART): b for name, b in buffers.items() if name.startswith(PART)}
        scale = spec.fmt.rule.read(parts)
        codes = _order().unpack(buffers["packed"], planes.count * n_in)[:n_out]
        return QTensor(planes.join(codes, scale), scale, spec.fmt)

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias`, computed in bfloat16 with sums in float32."""
        n_out, n_in = spec.shape
        packed, scale_zero = buffers["packed"], buffers["scale_zero"]
        flat = x.reshape(-1, n_in).to(torch.bfloat16)
        n_planes = packed.shape[1] * 2 // n_in
        if flat.shape[0] < dense_tokens():
            if n_planes > 1:
                flat = torch.cat([flat] * n_planes, dim=1)
            width = n_planes * n_in // scale_zero.shape[0]
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat.contiguous(), packed, width, scale_zero
            )
        else:
            dense = (
                torch.ops.auto_round.packed_int4_dense if torch.compiler.is_compiling() else multiply_dense
            )
            y = dense(flat, packed, scale_zero)
        if y.shape[1] != n_out:
            y = y[:, :n_out]
        y = y.reshape(*x.shape[:-1], n_out).to(x.dtype)
        return y if bias is None else y + bias


def _order() -> Order:
    order = find_order()
    if order is None:
        raise ValueError("this kernel refuses a PyTorch whose order of packed int4 matrices is not known")
    return order


def dense_tokens() -> int:
    """Tokens from which weights are unpacked."""
    return DENSE_TOKENS_BF16 if MULTIPLIES_BF16 else DENSE_TOKENS


def multiply_dense(x: Tensor, packed: Tensor, scale_zero: Tensor) -> Tensor:
    """`[tokens, in]` times the packed weight, unpacked band by band; `[tokens, rows]` bfloat16."""
    order = _order()
    n_in, n_long = x.shape[1], packed.shape[1] * 2
    y = torch.empty(x.shape[0], packed.shape[0], dtype=torch.bfloat16, device=x.device)
    rows = max(order.block, DENSE_BAND // n_long // order.block * order.block)
    scratch = Scratch.of(rows * n_long)
    dtype = torch.bfloat16 if MULTIPLIES_BF16 else torch.float32
    x = x.to(dtype)
    for band in bands(packed.shape[0], n_long, DENSE_BAND, order.block):
        w = order.weights(packed[band], scale_zero[:, band], scratch)
        if n_long != n_in:
            w = w[:n_in].add_(w[n_in:])
        y[:, band] = order.sort_outputs(x @ w.to(dtype))
    return y


def _shape_of_dense(x: Tensor, packed: Tensor, scale_zero: Tensor) -> Tensor:
    del scale_zero
    return x.new_empty(x.shape[0], packed.shape[0], dtype=torch.bfloat16, device=x.device)


register_operator(
    "packed_int4_dense(Tensor x, Tensor packed, Tensor scale_zero) -> Tensor", multiply_dense, _shape_of_dense
)
