"""Folders of quant_method `fp8` or `fbgemm_fp8`: FP8 weights, one float for a block, a row or a tensor.

`<name>` float8 `[..., out, in]` and `<name>_scale_inv` `[..., ceil(out / rows), ceil(in / columns)]`, what
codes are multiplied by; one number where `weight_block_size` is not given. Older tools say `<name>_scale`.

Source: DeepSeek-V3 `inference/kernel.py` (`weight_dequant`); Transformers 5.24
`integrations/finegrained_fp8.py`; AutoFP8 `auto_fp8/quantize.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError, ConfigError
from auto_round.facts.tensor import dtype_name
from auto_round.layouts.compressed_float import FP8_DTYPES, FloatLayout
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.group import Group
from auto_round.numerics.presets_float import FP8_BLOCK, fp8_format, fp8_powers
from auto_round.numerics.scale_power import PowerOfTwo
from auto_round.schemes.scheme import PRESET_SCHEMES, QuantizationScheme
from auto_round.schemes.vocabulary import SCALE_DTYPE_SPELLINGS
from auto_round.stored.packed import StoredWeight

_SCALES = ("_scale_inv", "_scale")
_AXES = (2, 3)
"""Of a matrix and of a stack."""
_GRIDS = {dtype: grid for grid, dtype in FP8_DTYPES.items() if isinstance(grid, FloatGrid)}


def read_fp8(config: Mapping[str, Any], files: Checkpoint) -> list[StoredWeight]:
    """Packed weights of a folder.

    Raises:
        ConfigError: `weight_block_size` is not two numbers.
        CheckpointError: an FP8 tensor without scales, or scales of another shape.
    """
    block = _block_size(config)
    names = [name for name in files.names if files.info(name).dtype in _GRIDS]
    return [_packed(name, block, files) for name in names]


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block; None where there are none."""
    said = config.get("weight_block_size")
    if said is None:
        return None
    if not isinstance(said, Sequence) or len(said) != 2 or not all(type(n) is int and n > 0 for n in said):
        raise ConfigError(f"weight_block_size of this checkpoint is {said!r}, expected two numbers")
    return said[0], said[1]


def _packed(name: str, block: tuple[int, int] | None, files: Checkpoint) -> StoredWeight:
    info = files.info(name)
    scale = next((name + suffix for suffix in _SCALES if name + suffix in files), None)
    if scale is None or len(info.shape) not in _AXES:
        raise CheckpointError(
            f'{files.folder}: "{name}" is FP8 {list(info.shape)}; expected a matrix, or a stack of them, '
            f'with "{name + _SCALES[0]}"'
        )
    *stack, n_out, n_in = info.shape
    numbers = files.info(scale)
    group = _group(tuple(numbers.shape[len(stack) :]), (n_out, n_in), block)
    fmt = _format(group, info.dtype, numbers.dtype)
    part = "exponent" if isinstance(fmt.rule, PowerOfTwo) else "step"
    layout = FloatLayout("fp8", _GRIDS[info.dtype], (), ((part, "scale", None),))
    return StoredWeight(
        name,
        (n_out, n_in),
        fmt,
        layout,
        {"weight": name, "scale": scale},
        stack=stack[0] if stack else None,
        scheme=_scheme(fmt, numbers.dtype),
    )


def _group(scales: tuple[int, ...], shape: tuple[int, int], block: tuple[int, int] | None) -> Group:
    """Which weights share a scale, by the shape of the scales of one matrix."""
    if all(n == 1 for n in scales) and block is None:
        return Group(0)
    if block is None and scales in ((shape[0], 1), (shape[0],)):
        return Group(-1)
    return FP8_BLOCK if block is None else Group(block[1], block[0])


def _format(group: Group, codes: torch.dtype, scales: torch.dtype) -> Format:
    if scales in (torch.float8_e8m0fnu, torch.uint8):
        return fp8_powers(group, grid=_GRIDS[codes])
    return fp8_format(group, grid=_GRIDS[codes], scale_dtype=scales)


def _scheme(fmt: Format, scales: torch.dtype) -> QuantizationScheme | None:
    """The preset of 128 x 128 blocks, where that is what is stored."""
    name = dtype_name(scales)
    if name not in SCALE_DTYPE_SPELLINGS:
        return None
    preset = PRESET_SCHEMES["FP8_BLOCK"]
    found = QuantizationScheme.from_dict({**preset.to_dict(), "scale_dtype": name})
    return found if found.weight_format() == fmt else None
