"""The floating formats: MX, NVFP4 and FP8."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from auto_round.errors import ConfigError, nearest
from auto_round.facts.tensor import dtype_name
from auto_round.numerics.format import Format
from auto_round.numerics.grid import Grid, IntGrid
from auto_round.numerics.grid_float import E2M1, E2M3, E3M2, E4M3, E5M2, E5M3, FloatGrid
from auto_round.numerics.group import Group
from auto_round.numerics.scale_float import LargestToTop, OverTensor
from auto_round.numerics.scale_power import below_rule, ceil_rule

MX_GROUP = 32
"""Weights that share a power of two. Source: OCP Microscaling Formats (MX) 1.0, section 5.2."""
NV_GROUP = 16
"""Weights that share an FP8 number in NVFP4."""
NV_TOP = 448.0
"""What the group with the largest weight gets: the largest number of E4M3."""


@dataclass(frozen=True, slots=True)
class MxElement:
    """Numbers of a microscaling format.

    Attributes:
        grid: the numbers.
        limit: a group whose larger extreme has this many steps or more gets the next power of two.
        fraction: bits behind the point of whole numbers.
    """

    grid: Grid
    limit: float
    fraction: int = 0


MX_ELEMENTS: dict[str, MxElement] = {
    "fp4": MxElement(E2M1, 7.0),
    "fp6": MxElement(E2M3, 7.75),
    "fp8": MxElement(E4M3, 448.0),
    "fp6_e3m2": MxElement(E3M2, 30.0),
    "fp8_e5m2": MxElement(E5M2, 61440.0),
    "int8": MxElement(IntGrid(8, -128), 128.0, 6),
    "int4": MxElement(IntGrid(4, -8), 8.0, 2),
}
"""Elements of MX formats. Source of the grids: MX 1.0, section 5.3; int4 follows int8.

Limits of `fp4`, `fp6` (E2M3) and `fp8` (E4M3), which folders hold, are those of compressed-tensors 0.20
(`generate_mx_scales` in `quantization/utils/mxfp_utils.py`), which chooses powers for activations by them
as a model runs; the others' are where an extreme would round to the number beyond the largest."""


def mx_format(element: str, *, ceil: bool = False) -> Format:
    """Microscaling (MX) format: 32 neighbouring weights share a power of two as their step.

    Args:
        element: a row of `MX_ELEMENTS`.
        ceil: take the least power under which nothing saturates; some groups then get a coarser step.

    Raises:
        ConfigError: an element that is not known.
    """
    if element not in MX_ELEMENTS:
        raise ConfigError(f'unknown MX element "{element}"; {nearest(element, MX_ELEMENTS)}')
    row = MX_ELEMENTS[element]
    rule = ceil_rule(row.grid, row.fraction) if ceil else below_rule(row.limit, row.fraction)
    return Format(f"mx{element}{'_rceil' if ceil else ''}", row.grid, Group(MX_GROUP), rule)


NV_SILENT = 0.125
"""What a group of inputs gets that is too small for an FP8 number: all its codes are 0 then, as engines give
zeros. Source: compressed-tensors 0.20, `_get_dtype_eps` in `quantization/utils/helpers.py`."""


def nv_format(blocks: FloatGrid = E4M3, *, measured: bool = False, times: bool = False) -> Format:
    """NVFP4: 16 neighbouring weights share an FP8 number, and the whole tensor shares one more number.

    The step of a group is the first divided by the second, see `OverTensor`.

    Args:
        blocks: grid of the FP8 numbers. The range of `E5M3` (unsigned) would mostly do without the tensor's
            number; it is kept so that weights of any size fit.
        measured: groups' numbers are measured as the model runs and stored nowhere. Stored ones are never 0,
            so that codes of the smallest groups still count; engines make zeros of such groups of inputs.
        times: steps are the product of both numbers, as GGUF files have it.
    """
    top = NV_TOP if blocks == E4M3 else blocks.hi
    name = ("nvfp4" if blocks == E4M3 else "nvfp4_e5m3") + ("_gguf" if times else "")
    least = NV_SILENT if measured else blocks.smallest
    return Format(name, E2M1, Group(NV_GROUP), OverTensor(blocks, top, least, times))


def fp8_format(group: Group, *, grid: FloatGrid = E4M3, scale_dtype: torch.dtype = torch.float32) -> Format:
    """FP8 weights with one float as the step of a row, of a block of rows and columns, or of a whole tensor.

    Args:
        group: weights that share the float.
        grid: kind of FP8.
        scale_dtype: stored dtype of the float.
    """
    where = {-1: "row", 0: "tensor"}.get(group.size, f"{group.rows}x{group.size}")
    name = f"fp8_{'e4m3' if grid == E4M3 else 'e5m2'}_{where}"
    if scale_dtype is not torch.float32:
        name += "_" + dtype_name(scale_dtype)
    return Format(name, grid, group, LargestToTop(scale_dtype))


def fp8_powers(group: Group, *, grid: FloatGrid = E4M3) -> Format:
    """FP8 weights with a power of two as the step of a group; arguments as in `fp8_format`.

    DeepSeek's newer models store the steps of their blocks so.
    """
    element = "fp8" if grid == E4M3 else "fp8_e5m2"
    plain = fp8_format(group, grid=grid)
    return Format(f"{plain.name}_e8m0", grid, group, below_rule(MX_ELEMENTS[element].limit))


FP8_BLOCK = Group(128, 128)
"""Blocks of DeepSeek-V3's FP8 weights. Source: its technical report (arXiv 2412.19437), section 3.3."""

FLOAT_FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(mx_format(element) for element in MX_ELEMENTS),
        *(mx_format(element, ceil=True) for element in ("fp4", "fp6", "fp8")),
        nv_format(),
        nv_format(E5M3),
        nv_format(times=True),
        *(fp8_format(group) for group in (Group(-1), Group(0), FP8_BLOCK, Group(32))),
        fp8_format(Group(-1), scale_dtype=torch.bfloat16),
        fp8_format(Group(-1), grid=E5M2),
    )
}
"""Floating formats by name: what the conformance kit runs over."""
