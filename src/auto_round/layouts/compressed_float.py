"""compressed-tensors order of floating formats: codes of 4 and 6 bits packed, FP8 a byte each.

With `out`, `in`, `n_groups` and `bits` of the weight; one row of `FLOATS` is one `format` of a configuration:

* codes of 4 and 6 bits: `weight_packed` `[out, in * bits / 8]` uint8, first input in the lowest bits;
* codes of 8 bits: `weight` `[out, in]` float8;
* `weight_scale`: E8M0 bytes, E4M3 numbers or floats, one for each group (`[1]` for a whole tensor);
* `weight_global_scale` `[1]` float32, NVFP4 only: what the E4M3 numbers are divided by.

Source: compressed-tensors 0.20, `compressors/{nvfp4,mxfp4,mxfp6,mxfp8,naive_quantized}/base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.facts.compressed import FP8, MXFP4, MXFP6, MXFP8, NVFP4
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts import integers
from auto_round.layouts.bits import pack_bits, unpack_bits
from auto_round.numerics.format import Format
from auto_round.numerics.grid import Grid
from auto_round.numerics.grid_float import E2M1, E2M3, E4M3, E5M2
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale_float import OverTensor

FP8_DTYPES: dict[Grid, torch.dtype] = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
"""Grids whose codes PyTorch has a dtype for."""

_WHOLE = 32
"""Codes that fill whole words at any width."""


@dataclass(frozen=True, slots=True)
class FloatLayout:
    """Floating codes, and scales by the names of their parts.

    Attributes:
        name: the `format` of a configuration.
        grid: of the codes.
        sizes: group sizes that readers take; empty for any that divides the rows.
        parts: part of the scale, its tensor, and the dtype that readers view its bytes as (None for its own).
        line: scales of rows are numbers in a line, `[out]`; groups are rows, or the whole tensor.
    """

    name: str
    grid: Grid
    sizes: tuple[int, ...]
    parts: tuple[tuple[str, str, torch.dtype | None], ...]
    line: bool = False

    def holds(self, fmt: Format) -> bool:
        """Whether a format has the layout's numbers and parts of scales, sizes aside."""
        if isinstance(fmt.rule, OverTensor) and (fmt.rule.blocks != E4M3 or fmt.rule.times):
            return False
        return fmt.grid == self.grid and list(fmt.rule.stored) == [part for part, _, _ in self.parts]

    def accepts(self, fmt: Format, shape: Sequence[int]) -> Refusal | None:
        """None for the layout's own grid, scales and group sizes, and groups that divide the rows.

        Blocks of several rows may be short on both sides: compressed-tensors pads them.
        """
        if not self.holds(fmt):
            return Refusal(self.name, f"holds other numbers than {fmt.name}")
        if len(shape) != 2:
            return Refusal(self.name, f"holds matrices [out, in], not shape {list(shape)}")
        if self.line and (fmt.group.size > 0 or fmt.group.rows > 1):
            what = f"groups of {fmt.group.rows} x {fmt.group.size}"
            return Refusal(self.name, f"holds one scale for each row or for the whole tensor, not {what}")
        if self.sizes and fmt.group.size not in self.sizes:
            sizes = ", ".join(map(str, self.sizes))
            return Refusal(self.name, f"needs groups of {sizes}, not {fmt.group.size}")
        width = fmt.group.width(shape[1])
        short = shape[1] % width and fmt.group.rows == 1
        if short or (self.sizes and width != fmt.group.size):
            return Refusal(
                self.name,
                f"needs full groups: {fmt.group.size} does not divide {shape[1]} inputs",
                "keep such layers (--ignore_layers)",
            )
        return None

    def spec(self, fmt: Format, shape: Sequence[int]) -> Mapping[str, TensorSpec]:
        """Codes, then the parts of the scales."""
        n_out, n_in = shape
        codes = {"weight_packed": TensorSpec(torch.uint8, (n_out, n_in * self.grid.bits // 8))}
        if self.grid in FP8_DTYPES:
            codes = {"weight": TensorSpec(FP8_DTYPES[self.grid], (n_out, n_in))}
        for part, name, dtype in self.parts:
            stored = fmt.rule.stored[part]
            codes[name] = TensorSpec(dtype or stored.dtype, self._shape(fmt, part, shape))
        return codes

    def pack(self, q: QTensor) -> Mapping[str, Tensor]:
        """Stored tensors of a quantized weight."""
        if self.grid in FP8_DTYPES:
            found = {"weight": q.codes.contiguous().view(FP8_DTYPES[self.grid])}
        else:
            n_in = q.shape[1]
            words = pack_bits(torch.nn.functional.pad(q.codes, (0, -n_in % _WHOLE)), self.grid.bits)
            packed = words.view(torch.uint8)[:, : n_in * self.grid.bits // 8]
            found = {"weight_packed": packed.contiguous()}
        for part, name, dtype in self.parts:
            value = q.scale.parts[part].contiguous()
            found[name] = value.reshape(self._shape(q.format, part, q.shape)).view(dtype or value.dtype)
        return found

    def unpack(self, parts: Mapping[str, Tensor], fmt: Format, shape: Sequence[int]) -> QTensor:
        """Inverse of `pack`.

        Raises:
            CheckpointError: tensors that `pack` would not have written.
        """
        integers.check_parts(self.name, parts, self.spec(fmt, shape))
        if self.grid in FP8_DTYPES:
            codes = parts["weight"].view(torch.uint8)
        else:
            missing = (-shape[1] % _WHOLE) * self.grid.bits // 8
            octets = torch.nn.functional.pad(parts["weight_packed"], (0, missing)).contiguous()
            codes = unpack_bits(octets.view(torch.int32), self.grid.bits)[:, : shape[1]].contiguous()
        groups = fmt.group.scale_shape(shape)
        read = {
            part: parts[name].view(fmt.rule.stored[part].dtype).reshape(fmt.rule.stored[part].shape(groups))
            for part, name, _ in self.parts
        }
        return QTensor(codes, fmt.rule.read(read), fmt)

    def _shape(self, fmt: Format, part: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Stored shape of a part; what belongs to the whole tensor is one number in a line."""
        if part in fmt.shared:
            return (1,)
        found = fmt.rule.stored[part].shape(fmt.group.scale_shape(shape))
        return found[:-1] if self.line else found


_EXPONENT = (("exponent", "weight_scale", None),)
_STEP = (("step", "weight_scale", None),)

FLOATS: dict[str, FloatLayout] = {
    layout.name: layout
    for layout in (
        FloatLayout(MXFP4, E2M1, (32,), _EXPONENT),
        FloatLayout(MXFP6, E2M3, (32,), _EXPONENT),
        FloatLayout(MXFP8, E4M3, (32,), _EXPONENT),
        FloatLayout(FP8, E4M3, (), _STEP),
        FloatLayout(
            NVFP4,
            E2M1,
            (16,),
            (
                ("block", "weight_scale", torch.float8_e4m3fn),
                ("tensor", "weight_global_scale", None),
            ),
        ),
    )
}
"""Layouts of floating formats by the `format` of a compressed-tensors configuration."""


FP8_LINES = FloatLayout("auto_round_fp8", E4M3, (), _STEP, line=True)
"""FP8 weights as auto-round 0.16 writes them (`packing_format` `auto_round:fp8_static`)."""
