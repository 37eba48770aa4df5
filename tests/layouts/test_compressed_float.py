"""Floating formats in the order of compressed-tensors: what the library itself makes of our bytes."""

from __future__ import annotations

import pytest
import torch

from auto_round.layouts.compressed_float import FLOATS
from auto_round.layouts.table import LAYOUTS
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import E2M1, E2M3, E4M3
from auto_round.numerics.group import Group
from auto_round.numerics.presets_float import FLOAT_FORMATS, FP8_BLOCK, fp8_format
from auto_round.numerics.scale_float import LargestToTop, OverTensor
from auto_round.numerics.scale_power import floor_rule
from auto_round.testing.layout_kit import check_round_trip

FORMATS = {
    "mxfp4-pack-quantized": Format("mxfp4", E2M1, Group(32), floor_rule(E2M1)),
    "mxfp6-pack-quantized": Format("mxfp6", E2M3, Group(32), floor_rule(E2M3)),
    "mxfp8-quantized": Format("mxfp8", E4M3, Group(32), floor_rule(E4M3)),
    "float-quantized": Format("fp8", E4M3, Group(-1), LargestToTop(torch.bfloat16)),
    "nvfp4-pack-quantized": Format("nvfp4", E2M1, Group(16), OverTensor(E4M3, 448.0, E4M3.smallest)),
}
ARGUMENTS = {
    "mxfp4-pack-quantized": {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": torch.uint8,
    },
    "mxfp6-pack-quantized": {
        "num_bits": 6,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": torch.uint8,
    },
    "mxfp8-quantized": {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    "float-quantized": {"num_bits": 8, "strategy": "channel"},
    "nvfp4-pack-quantized": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
}


def weight(shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-3, 2, shape[0]).unsqueeze(-1)).to(torch.bfloat16)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(4, 64), (7, 96), (1, 32)])
def test_bytes_come_back(name, shape):
    layout, fmt = FLOATS[name], FORMATS[name]
    assert layout.accepts(fmt, shape) is None
    check_round_trip(layout, fmt.quantize(weight(shape)))


@pytest.mark.parametrize("name", FORMATS)
def test_the_library_finds_the_same_weights(name):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    layout, fmt = FLOATS[name], FORMATS[name]
    q = fmt.quantize(weight((8, 64)))
    args = quantization.QuantizationArgs(type="float", symmetric=True, **ARGUMENTS[name])
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry(name)
    theirs = compressor.decompress(dict(layout.pack(q)), scheme)["weight"]
    # exact in bfloat16 but for FP8 with free steps, where products are rounded to it once
    assert torch.equal(theirs.float(), fmt.dequantize(q, torch.bfloat16).float())


@pytest.mark.parametrize("name", FORMATS)
def test_the_library_writes_the_same_bytes(name):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    layout, fmt = FLOATS[name], FORMATS[name]
    w = weight((8, 64))
    q = fmt.quantize(w)
    ours = layout.pack(q)
    args = quantization.QuantizationArgs(type="float", symmetric=True, **ARGUMENTS[name])
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry(name)
    scales = {"weight_scale": q.scale.step}
    if "weight_global_scale" in ours:
        scales = {
            "weight_scale": ours["weight_scale"].float(),
            "weight_global_scale": ours["weight_global_scale"],
        }
    theirs = compressor.compress({"weight": w.float(), **scales}, scheme)
    codes = next(iter(ours))
    assert torch.equal(ours[codes].view(torch.uint8), theirs[codes].view(torch.uint8))


BLOCKS = fp8_format(FP8_BLOCK)


@pytest.mark.parametrize("shape", [(256, 256), (200, 256), (256, 200), (96, 64), (130, 300)], ids=str)
def test_blocks_may_be_short_on_both_sides_as_in_the_library(shape):
    naive = pytest.importorskip("compressed_tensors.compressors.naive_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    layout, w = FLOATS["float-quantized"], weight(shape).float()
    assert layout.accepts(BLOCKS, shape) is None
    ours = check_round_trip(layout, BLOCKS.quantize(w))
    args = quantization.QuantizationArgs(
        type="float", num_bits=8, symmetric=True, strategy="block", block_structure=[128, 128]
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = naive.NaiveQuantizationCompressor
    theirs = compressor.compress({"weight": w, "weight_scale": ours["weight_scale"]}, scheme)
    assert torch.equal(ours["weight"].view(torch.uint8), theirs["weight"].view(torch.uint8))
    seen = compressor.decompress(dict(ours), scheme)["weight"]
    assert torch.equal(seen, BLOCKS.dequantize(BLOCKS.quantize(w)))


@pytest.mark.parametrize("name", FORMATS)
def test_what_readers_cannot_take_is_refused(name):
    layout, fmt = FLOATS[name], FORMATS[name]
    others = [other for other in FORMATS if other != name]
    assert all(FLOATS[other].accepts(fmt, (4, 64)) is not None for other in others)
    assert layout.accepts(fmt, (2, 4, 64)) is not None
    if layout.sizes:
        assert layout.accepts(fmt, (4, 88)) is not None
        wide = Format(fmt.name, fmt.grid, Group(64), fmt.rule)
        assert layout.accepts(wide, (4, 64)) is not None


def test_packing_formats_of_auto_round_that_hold_floats():
    held = {
        name: {n for n, fmt in FLOAT_FORMATS.items() if layout.accepts(fmt, (256, 256)) is None}
        for name, layout in LAYOUTS.items()
    }
    assert held.pop("auto_round:llm_compressor") == {
        *("mxfp4", "mxfp6", "mxfp8", "mxfp4_rceil", "mxfp6_rceil", "mxfp8_rceil", "nvfp4"),
        *("fp8_e4m3_row", "fp8_e4m3_tensor", "fp8_e4m3_128x128", "fp8_e4m3_1x32", "fp8_e4m3_row_bfloat16"),
    }
    by_row = {"fp8_e4m3_row", "fp8_e4m3_tensor", "fp8_e4m3_row_bfloat16"}
    assert {name: found for name, found in held.items() if found} == {
        "auto_round:fp8": by_row,
        "auto_round:fp8_static": by_row,
    }
