"""The `cpu_float` kernel: packed FP4 and FP8 weights on a CPU through an own C program.

The reference unpacks such weights in ten passes over memory, 1.7 to 4 ns a weight. The program unpacks them
in registers: one token takes 0.15 to 0.21 ns a weight (one thread of an AMD EPYC with AVX2); a product with a
bfloat16 weight takes 0.20 (docs/LOG.md). Only the result is rounded to the dtype of the activations.

From `DENSE_TOKENS` tokens on, bands of the weight are dequantized once and multiplied as ordinary matrices.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auto_round.compiled import INSTRUCTIONS, addresses, library
from auto_round.errors import Refusal
from auto_round.kernels.cpu_int4 import DENSE_BAND, MULTIPLIES_BF16
from auto_round.kernels.kernel import LinearSpec, rounded_input
from auto_round.kernels.operators import register_operator
from auto_round.kernels.reference import PART
from auto_round.numerics.at_once import bands
from auto_round.numerics.grid_float import E2M1, E4M3, FloatGrid
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.rule import ScaleRule
from auto_round.numerics.scale_float import LargestToTop, OverTensor
from auto_round.numerics.scale_power import PowerOfTwo

SOURCE = Path(__file__).with_name("cpu_float.c")

BLOCK = 64
"""Weights of a row that the program unpacks together."""

NARROW = (16, 32)
"""Groups smaller than a block that it knows."""

DENSE_TOKENS = 12
"""Tokens from which unpacking once is faster: with one thread and AVX2, 8 tokens take 0.65 (FP8) to 1.0
(NVFP4) and 16 take 1.3 to 2.0 ns a weight; unpacked, 0.95 and 1.2."""

RULES = (PowerOfTwo, OverTensor, LargestToTop)
"""Rules of scales that the kernel knows, see `_steps`."""

_F16C = "-mf16c"
"""Conversion of float16, which every processor with AVX2 has."""


@dataclass(frozen=True, slots=True)
class CpuFloatKernel:
    """FP4 (E2M1) and FP8 (E4M3) weights; steps of every kind, as stored."""

    name: str = "cpu_float"

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None for these numbers where blocks of 64 weights tile rows and groups, with a C compiler."""
        why = _other_numbers(spec) or _other_shape(spec)
        if why:
            return Refusal(self.name, why)
        program = _program()
        return Refusal(self.name, program.reason, program.remedy) if isinstance(program, Refusal) else None

    def compute_dtype(self, spec: LinearSpec) -> torch.dtype:
        """That of the activations."""
        return spec.dtype

    def prepare(self, q: QTensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        """Codes in the order of the program, and the scale's parts as stored."""
        buffers = {PART + name: part.contiguous() for name, part in q.scale.parts.items()}
        codes = _pairs(q.codes) if spec.fmt.grid == E2M1 else q.codes.contiguous()
        return {"codes": codes, **buffers}

    def restore(self, buffers: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Inverse of `prepare`."""
        codes = buffers["codes"]
        parts = {name.removeprefix(PART): b for name, b in buffers.items() if name.startswith(PART)}
        codes = _unpaired(codes) if spec.fmt.grid == E2M1 else codes
        return QTensor(codes, spec.fmt.rule.read(parts), spec.fmt)

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias` with sums in float32."""
        x, w = rounded_input(x, buffers, spec), _Weight.of(buffers, spec)
        multiply = torch.ops.auto_round.packed_float_linear if torch.compiler.is_compiling() else _multiply
        y: Tensor = multiply(x, w.codes, w.steps, w.table, w.width, w.rows)
        return y if bias is None else y + bias


def _other_numbers(spec: LinearSpec) -> str:
    """Why these are not the numbers of this kernel; empty when they are."""
    if spec.device != "cpu":
        return f"runs on a CPU, not on {spec.device}"
    if spec.fmt.grid not in (E2M1, E4M3):
        return f"holds FP4 (E2M1) and FP8 (E4M3) numbers, not {spec.fmt.name}"
    if type(spec.fmt.rule) not in RULES:
        return f"does not know how the steps of {spec.fmt.name} are stored"
    if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 or float32 activations, not {spec.dtype}"
    if spec.held not in (None, torch.float32, spec.dtype):
        return f"does not round dequantized weights to {spec.held}"
    return ""


def _other_shape(spec: LinearSpec) -> str:
    """Why blocks of 64 weights do not tile rows and groups; empty when they do."""
    n_in = spec.shape[1]
    width = spec.fmt.group.width(n_in)
    if n_in % BLOCK == 0 and (width % BLOCK == 0 or width in NARROW):
        return ""
    return (
        f"needs rows of multiples of {BLOCK} and groups of 16, 32 or such a multiple, not {n_in} and {width}"
    )


def _steps(rule: ScaleRule, buffers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Step of each group, float32; or a byte for it, and the step of each byte, `[256]` float32."""
    if isinstance(rule, PowerOfTwo):
        return buffers[PART + "exponent"], _powers(rule)
    if isinstance(rule, OverTensor):
        return buffers[PART + "block"], rule.step(_numbers(rule.blocks), buffers[PART + "tensor"].flatten())
    return buffers[PART + "step"].float(), None


@functools.cache
def _powers(rule: PowerOfTwo) -> Tensor:
    return rule.read({"exponent": _bytes()}).step


@functools.cache
def _numbers(blocks: FloatGrid) -> Tensor:
    return blocks.decode(_bytes())


def _bytes() -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device="cpu")


def _pairs(codes: Tensor) -> Tensor:
    """Codes of 4 bits, one a byte `[out, in]`, as the program reads them, `[out, in / 2]`."""
    low, high = (codes.view(len(codes), -1, 2, 4, 2, 4)[:, :, i].transpose(2, 3) for i in range(2))
    return (low | (high << 4)).reshape(len(codes), -1)


def _unpaired(octets: Tensor) -> Tensor:
    """Inverse of `_pairs`."""
    lanes = octets.view(len(octets), -1, 2, 4, 4).transpose(2, 3)
    return torch.stack([lanes & 15, lanes >> 4], dim=2).reshape(len(octets), -1)


class _Call(ctypes.Structure):
    """`call` of the program."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "steps", "table", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "n_in", "n_out", "width", "rows")),
        *((name, ctypes.c_int) for name in ("bits", "threads")),
    )


@dataclass(frozen=True, slots=True)
class _Weight:
    """A packed weight, or some of its rows.

    Attributes:
        codes: as `prepare` gives them.
        steps: `[ceil(out / rows), ceil(in / width)]`, float32, or bytes with a table.
        table: step of each byte, `[256]` float32.
        width: weights of a row that share a step.
        rows: rows that share it.
    """

    codes: Tensor
    steps: Tensor
    table: Tensor | None
    width: int
    rows: int

    @classmethod
    def of(cls, buffers: Mapping[str, Tensor], spec: LinearSpec) -> _Weight:
        """The weight of a layer's buffers."""
        group = spec.fmt.group
        rows = spec.shape[0] if group.size == 0 else group.rows
        return cls(buffers["codes"], *_steps(spec.fmt.rule, buffers), group.width(spec.shape[1]), rows)

    def call(self, function: str, n_in: int, x: Tensor | None, y: Tensor) -> Tensor:
        """Let the program fill `y`, float32."""
        program = _program()
        if isinstance(program, Refusal):  # a kernel that refuses is never asked to multiply
            raise TypeError(str(program))
        n_out = len(self.codes)
        tensors = (x, self.codes, self.steps, self.table, y)
        sizes = (0 if x is None else len(x), n_in, n_out, self.width, self.rows)
        bits = 8 * self.codes.shape[1] // n_in
        request = _Call(*addresses(*tensors), *sizes, bits, torch.get_num_threads())
        getattr(program, f"auto_round_float_{function}")(ctypes.byref(request))
        return y

    def part(self, start: int, count: int) -> _Weight:
        """Some rows, from a multiple of `rows` on."""
        codes, steps = self.codes[start : start + count], self.steps[start // self.rows :]
        return _Weight(codes, steps, self.table, self.width, self.rows)


def _multiply(x: Tensor, codes: Tensor, steps: Tensor, table: Tensor | None, width: int, rows: int) -> Tensor:
    """`[..., in]` times the `_Weight` of these parts, `[..., out]` in the dtype of `x`."""
    n_in, n_out = x.shape[-1], len(codes)
    flat = x.reshape(-1, n_in)
    weight = _Weight(codes, steps, table, width, rows)
    if len(flat) < DENSE_TOKENS:
        y = torch.empty(len(flat), n_out, dtype=torch.float32, device="cpu")
        weight.call("linear", n_in, flat.float().contiguous(), y)
    else:
        y = _multiply_dense(flat, weight, n_out)
    return y.to(x.dtype).reshape(*x.shape[:-1], n_out)


def _multiply_dense(x: Tensor, weight: _Weight, n_out: int) -> Tensor:
    """`[tokens, in]` times the weight, dequantized band by band."""
    n_in = x.shape[1]
    dtype = torch.bfloat16 if MULTIPLIES_BF16 and x.dtype is torch.bfloat16 else torch.float32
    cuts = list(bands(n_out, n_in, DENSE_BAND, weight.rows if weight.rows < n_out else 1))
    x = x.to(dtype)
    y = torch.empty(len(x), n_out, dtype=dtype, device="cpu")
    scratch = torch.empty(max(cut.stop - cut.start for cut in cuts), n_in, dtype=torch.float32, device="cpu")
    for cut in cuts:
        band = scratch[: cut.stop - cut.start]
        weight.part(cut.start, len(band)).call("numbers", n_in, None, band)
        y[:, cut] = x @ band.to(dtype).t()
    return y


def _shape_of(x: Tensor, codes: Tensor, steps: Tensor, table: Tensor | None, width: int, rows: int) -> Tensor:
    del steps, table, width, rows
    return x.new_empty(*x.shape[:-1], codes.shape[0])


register_operator(
    "packed_float_linear(Tensor x, Tensor codes, Tensor steps, Tensor? table, SymInt width, SymInt rows)"
    " -> Tensor",
    _multiply,
    _shape_of,
)


@functools.cache
def _program() -> ctypes.CDLL | Refusal:
    """The compiled program, or why it cannot run here; without AVX2 it is plain C, four times as slow."""
    fast = torch.backends.cpu.get_cpu_capability() in INSTRUCTIONS
    return library(SOURCE, (*INSTRUCTIONS["AVX2"], _F16C) if fast else ())
