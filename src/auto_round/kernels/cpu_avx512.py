"""The `cpu_avx512` kernel: the packed int4 matrices of `cpu_int4` through an own C program.

PyTorch's operator converts every code to float32 and applies its step, and fetches from memory too few bytes
ahead: on two threads of a Xeon with AVX-512 BF16 it reads 13 GB/s of weights for one token. The program looks
codes up as bfloat16 numbers, applies steps to sums of groups and reads 24 GB/s. From `AMX_TOKENS` tokens on
it unpacks strips of weights into a core's cache and multiplies them by the matrix unit.

The weights in memory are those of `cpu_int4`, whose paths take over where the program has none.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auto_round.compiled import library
from auto_round.errors import Refusal
from auto_round.kernels.cpu_int4 import CpuIntKernel, dense_tokens, multiply_dense
from auto_round.kernels.int4_order import find_order
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.operators import register_operator

SOURCE = Path(__file__).with_name("cpu_avx512.c")

INSTRUCTIONS = ("f", "bw", "vl", "vbmi", "bf16")
"""Extensions of AVX-512 that the program needs: Xeons since Sapphire Rapids, Zen 4 and later."""

BLOCK = 64
"""Outputs of a block of the program, which is also PyTorch's with AVX-512."""

AMX_TOKENS = 5
"""Tokens from which the matrix unit is faster: 11 million weights on two threads take 0.55 ms for 4 tokens
and 1.05 ms for 8 without it, and 0.67 ms with it for up to 32 (0.9 to 1.1 ms as a bfloat16 matrix)."""

TILE_TOKENS = 32
"""The matrix unit reads activations of this many tokens at a time."""


@dataclass(frozen=True, slots=True)
class CpuAvx512Kernel(CpuIntKernel):
    """An own program on the packed int4 matrices of `cpu_int4`; the same weights, the same bound."""

    name: str = "cpu_avx512"
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None for what `cpu_int4` and `cpu_int8` take, on a CPU with AVX-512 BF16 and a C compiler."""
        refusal = CpuIntKernel.refuses(self, spec)
        if refusal is not None:
            return refusal
        program = _program()
        return Refusal(self.name, program.reason, program.remedy) if isinstance(program, Refusal) else None

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias`, computed in bfloat16 with sums in float32."""
        flat = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
        multiply = torch.ops.auto_round.packed_int4_linear if torch.compiler.is_compiling() else _multiply
        y: Tensor = multiply(flat, buffers["packed"], buffers["scale_zero"], spec.shape[0])
        if x.dtype != torch.bfloat16:
            y = y.to(x.dtype)
        return y if bias is None else y + bias


def _multiply(x: Tensor, packed: Tensor, scale_zero: Tensor, n_out: int) -> Tensor:
    """`[..., in]` bfloat16 times a packed weight, `[..., out]` bfloat16."""
    n_in = x.shape[-1]
    tokens = x.numel() // n_in
    if tokens >= dense_tokens() and not _has_amx():
        dense = multiply_dense(x.reshape(tokens, n_in), packed, scale_zero)
        return dense[:, :n_out].reshape(*x.shape[:-1], n_out)
    y = x.new_empty(*x.shape[:-1], n_out)
    if tokens == 0:
        return y
    program = _program()
    if isinstance(program, Refusal):  # a kernel that refuses is never asked to multiply
        raise TypeError(str(program))
    wide = tokens >= AMX_TOKENS and _has_amx()
    x = x.contiguous()
    if wide and tokens % TILE_TOKENS:
        x = torch.nn.functional.pad(x.view(tokens, n_in), (0, 0, 0, -tokens % TILE_TOKENS))
    planes = packed.shape[1] * 2 // n_in
    failed = (program.auto_round_linear_amx if wide else program.auto_round_linear)(
        x.data_ptr(),
        packed.data_ptr(),
        scale_zero.data_ptr(),
        y.data_ptr(),
        tokens,
        n_in,
        n_out,
        planes * n_in // scale_zero.shape[0],
        planes,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the sums of packed int4 matrices")
    return y


def _shape_of(x: Tensor, packed: Tensor, scale_zero: Tensor, n_out: int) -> Tensor:
    del packed, scale_zero
    return x.new_empty(*x.shape[:-1], n_out)


register_operator(
    "packed_int4_linear(Tensor x, Tensor packed, Tensor scale_zero, SymInt n_out) -> Tensor",
    _multiply,
    _shape_of,
)


@functools.cache
def _program() -> ctypes.CDLL | Refusal:
    """The compiled program, or why it cannot run here."""
    if not torch.cpu._is_avx512_bf16_supported():
        return Refusal(SOURCE.name, "needs a processor with AVX-512 BF16")
    order = find_order()
    if order is None or order.block != BLOCK:
        return Refusal(SOURCE.name, "this PyTorch packs int4 matrices in another order")
    options = (*(f"-mavx512{name}" for name in INSTRUCTIONS), "-mamx-tile", "-mamx-bf16")
    program = library(SOURCE, options)
    if isinstance(program, Refusal):
        return program
    if not program.auto_round_usable():
        return Refusal(SOURCE.name, f"needs AVX-512 with {', '.join(INSTRUCTIONS)}")
    for function in (program.auto_round_linear, program.auto_round_linear_amx):
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 5 + [ctypes.c_int]
    return program


@functools.cache
def _has_amx() -> bool:
    """Whether this CPU has a matrix unit and the system lets this process use it."""
    return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())
