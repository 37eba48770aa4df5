"""The `triton` kernel: whole-number weights of 2 to 8 bits and groups of any width on GPUs.

One token: rows are read once and summed in float32. Up to `FUSED_TOKENS` tokens: weights are unpacked in
registers and multiplied by the matrix units. More: bands of the weight are unpacked to 16 bits and
multiplied by cuBLAS.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.kernels import triton_table as table
from auto_round.kernels.fields import BitFields
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.operators import ANY_DEVICE, register_operator
from auto_round.kernels.reference import PART
from auto_round.layouts import integers
from auto_round.layouts.bits import WIDTHS
from auto_round.numerics.group import Group
from auto_round.numerics.qtensor import QTensor

DEVICES = ("cuda", "xpu")
"""Kinds of device that Triton compiles for."""

INSTALL = 'pip install "triton>=3.5" (Linux), or "triton-windows"'


@dataclass(frozen=True, slots=True)
class TritonKernel:
    """Own Triton programs.

    Steps and zero points stay as they are stored. Weights are computed in float32; with several tokens they
    are rounded once to the dtype of the activations, as the reference kernel does.
    """

    name: str = "triton"

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None for whole-number formats of 2 to 8 bits with 16-bit activations on a GPU with Triton."""
        if spec.device not in DEVICES and not (spec.device == "cpu" and _interpreted()):
            return Refusal(self.name, f"runs on {' or '.join(DEVICES)}, not on {spec.device}")
        by_row = replace(spec.fmt, group=Group(-1)) if spec.fmt.group.size == 0 else spec.fmt
        refusal = integers.refuse(self.name, by_row, spec.shape, WIDTHS)
        if refusal is not None:
            return refusal
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return Refusal(self.name, f"takes bfloat16 or float16 activations, not {spec.dtype}")
        if importlib.util.find_spec("triton") is None:
            return Refusal(self.name, "Triton is not installed", INSTALL)
        if spec.device != "cpu" and not _present(spec.device):
            return Refusal(self.name, f"no {spec.device} device is here")
        return None

    def compute_dtype(self, spec: LinearSpec) -> torch.dtype:
        """That of the activations."""
        return spec.dtype

    def prepare(self, q: QTensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        """Words in the order of `BitFields` and the scale's parts as stored."""
        words = BitFields.of(spec.fmt, spec.shape[1]).pack(q.codes)
        return {"words": words, **{PART + name: part.contiguous() for name, part in q.scale.parts.items()}}

    def restore(self, buffers: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Inverse of `prepare`."""
        codes = BitFields.of(spec.fmt, spec.shape[1]).unpack(buffers["words"])
        parts = {name.removeprefix(PART): b for name, b in buffers.items() if name.startswith(PART)}
        return QTensor(codes, spec.fmt.rule.read(parts), spec.fmt)

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias`, sums in float32."""
        fields = BitFields.of(spec.fmt, spec.shape[1])
        multiply = torch.ops.auto_round.triton_linear if torch.compiler.is_compiling() else _multiply
        y: Tensor = multiply(
            x,
            buffers["words"],
            buffers[PART + "step"],
            buffers.get(PART + "zero"),
            bias,
            spec.shape[0],
            fields.bits,
            fields.width,
        )
        return y


@dataclass(frozen=True, slots=True)
class _Call:
    """What every program is told of a weight; for an absent zero point the step is given and not read."""

    words: Tensor
    step: Tensor
    zero: Tensor
    has_zero: bool
    n_out: int
    fields: BitFields
    step_row: int

    def some_rows(self, rows: slice) -> _Call:
        """The same of some rows of the weight."""
        words = self.words[rows]
        if not self.step_row:  # all rows share one step
            return replace(self, words=words, n_out=words.shape[0])
        return replace(self, words=words, step=self.step[rows], zero=self.zero[rows], n_out=words.shape[0])

    def arguments(self, tile: table.Tile) -> dict[str, Any]:
        """What all programs take of a weight and a tile."""
        f = self.fields
        return {
            "words": self.words,
            "step": self.step,
            "zero": self.zero,
            "n_out": self.n_out,
            "n_in": f.n_in,
            "n_words": f.n_words,
            "pitch": f.pitch,
            "step_row": self.step_row,
            "BITS": f.bits,
            "WIDTH": f.width,
            "SPAN": f.span,
            "FULL": f.full,
            "HAS_ZERO": self.has_zero,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def _multiply(
    x: Tensor,
    words: Tensor,
    step: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    *layer: int,
) -> Tensor:
    """`x W^T + bias` of a prepared weight; `layer` is its outputs, bits and the width of its groups."""
    n_out, bits, width = layer
    fields = BitFields(bits, x.shape[-1], width)
    flat = x.reshape(-1, fields.n_in)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    n_tokens = flat.shape[0]
    if n_tokens == 0:
        return x.new_empty(*x.shape[:-1], n_out)
    row = step.shape[1] if step.shape[0] == n_out else 0
    call = _Call(words, step, step if zero is None else zero, zero is not None, n_out, fields, row)
    with _on(x.device):
        if n_tokens <= table.DECODE_TOKENS:
            y = _decode(call, flat, bias)
        elif n_tokens <= table.FUSED_TOKENS:
            y = _fused(call, flat, bias)
        else:
            y = _dense(call, flat, bias)
    return y.view(*x.shape[:-1], n_out)


def _shape_of(
    x: Tensor, words: Tensor, step: Tensor, zero: Tensor | None, bias: Tensor | None, *layer: int
) -> Tensor:
    del words, step, zero, bias
    return x.new_empty(*x.shape[:-1], layer[0])


register_operator(
    "triton_linear(Tensor x, Tensor words, Tensor step, Tensor? zero, Tensor? bias, SymInt n_out, int bits, "
    "int width) -> Tensor",
    _multiply,
    _shape_of,
    ANY_DEVICE,
)


def _decode(call: _Call, x: Tensor, bias: Tensor | None) -> Tensor:
    from auto_round.kernels.triton_code import EXPONENT, one_token

    n_words = call.fields.n_words
    y = torch.empty(x.shape[0], call.n_out, dtype=x.dtype, device=x.device)
    tile = table.decode_tile(call.n_out, n_words)
    one_token[(-(-call.n_out // tile.rows), x.shape[0])](
        x=x,
        bias=x if bias is None else bias,
        y=y,
        exponent=EXPONENT,
        stride_x=x.stride(0),
        **call.arguments(tile),
        HAS_BIAS=bias is not None,
        PASSES=-(-n_words // tile.columns),
    )
    return y


def _fused(call: _Call, x: Tensor, bias: Tensor | None) -> Tensor:
    from auto_round.kernels.triton_code import EXPONENT, several_tokens

    n_tokens, n_words = x.shape[0], call.fields.n_words
    tile = table.prefill_tile(n_tokens, call.fields.per_word, _shared_memory(x.device))
    grid = (-(-call.n_out // tile.rows), -(-n_tokens // tile.tokens))
    split = table.splits(grid[0] * grid[1], -(-n_words // tile.columns), _processors(x.device))
    shape, dtype = (n_tokens, call.n_out), x.dtype
    if split > 1:
        shape, dtype = (split * n_tokens, call.n_out), torch.float32
    y = torch.empty(shape, dtype=dtype, device=x.device)
    in_program = bias is not None and split == 1
    several_tokens[(grid[0], grid[1], split)](
        x=x,
        bias=bias if in_program else x,
        y=y,
        n_tokens=n_tokens,
        exponent=EXPONENT,
        stride_x=x.stride(0),
        **call.arguments(tile),
        HAS_BIAS=in_program,
        TOKENS=tile.tokens,
        SPLIT=split,
        PASSES=-(-n_words // (tile.columns * split)),
    )
    if split == 1:
        return y
    total = y.view(split, n_tokens, call.n_out).sum(0)
    return (total if bias is None else total + bias.float()).to(x.dtype)


def _dense(call: _Call, x: Tensor, bias: Tensor | None) -> Tensor:
    n_in = call.fields.n_in
    rows = min(call.n_out, max(1, table.DENSE_BAND // n_in // table.DENSE_ROWS) * table.DENSE_ROWS)
    y = torch.empty(x.shape[0], call.n_out, dtype=x.dtype, device=x.device)
    scratch = torch.empty(rows, n_in, dtype=x.dtype, device=x.device)
    for start in range(0, call.n_out, rows):
        band = slice(start, min(start + rows, call.n_out))
        w = _unpacked(call.some_rows(band), scratch[: band.stop - start])
        y[:, band] = torch.nn.functional.linear(x, w, None if bias is None else bias[band])
    return y


def _unpacked(call: _Call, w: Tensor) -> Tensor:
    """Fill `w` `[out, in]` with the weights."""
    from auto_round.kernels.triton_code import EXPONENT, unpacked

    n_words = call.fields.n_words
    tile = replace(table.UNPACK, columns=min(table.UNPACK.columns, table.power_above(n_words)))
    grid = (-(-call.n_out // tile.rows), -(-n_words // tile.columns))
    unpacked[grid](w=w, exponent=EXPONENT, **call.arguments(tile))
    return w


def _interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs the programs on a CPU to check their numbers."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _present(device: str) -> bool:
    best = torch.accelerator.current_accelerator(check_available=True)
    return best is not None and best.type == device


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 4


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Shared memory that one program may take, bytes."""
    if device.type == "cpu":  # the interpreter has no limit
        return 1 << 30
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def _on(device: torch.device) -> torch.accelerator.device_index:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.accelerator.device_index(device.index if device.type != "cpu" else None)
