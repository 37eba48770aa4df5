"""All tensors of a layer: the number of its input travels with the weight, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from auto_round.errors import CheckpointError, InternalError
from auto_round.layouts.layer import LayerLayout
from auto_round.layouts.table import COMPRESSED_NUMBERS, GPTQ_V1
from auto_round.numerics.activation_float import CalibratedScale, MeasuredScales
from auto_round.numerics.group import Group
from auto_round.numerics.presets import int_format
from auto_round.numerics.presets_float import fp8_format, mx_format, nv_format
from auto_round.numerics.qtensor import QuantizedLayer

SHAPE = (32, 64)
FP8_INPUTS = CalibratedScale(fp8_format(Group(0))).stored_in(torch.bfloat16)
CASES = {
    "fp8": (fp8_format(Group(-1)), FP8_INPUTS, "input_scale", torch.bfloat16),
    "nvfp4": (nv_format(), CalibratedScale(nv_format()), "input_global_scale", torch.float32),
}


def stored(fmt, inputs):
    return LayerLayout(COMPRESSED_NUMBERS, fmt, SHAPE, inputs)


def quantized(fmt, inputs=None):
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    number = inputs.fixed(3.3).number if isinstance(inputs, CalibratedScale) else None
    return QuantizedLayer(fmt.quantize(w), number)


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_the_input_comes_back_bit_for_bit(case):
    fmt, inputs, name, dtype = CASES[case]
    layout, layer = stored(fmt, inputs), quantized(fmt, inputs)
    parts = layout.pack(layer)
    assert list(parts) == list(layout.spec())
    assert (parts[name].dtype, tuple(parts[name].shape)) == (dtype, (1,))
    back = layout.unpack(parts)
    assert torch.equal(back.input_scale, layer.input_scale)
    assert torch.equal(back.weight.codes, layer.weight.codes)
    x = torch.randn(4, SHAPE[1], generator=torch.Generator().manual_seed(2)).bfloat16()
    tuned, read = inputs.fixed(3.3), inputs.holding(back.input_scale)
    assert torch.equal(tuned.fake_quantize(x), read.fake_quantize(x))


@pytest.mark.parametrize(
    ("fmt", "inputs"), [(mx_format("fp4"), MeasuredScales(mx_format("fp4"))), (fp8_format(Group(-1)), None)]
)
def test_inputs_without_a_number_store_none(fmt, inputs):
    layout, layer = stored(fmt, inputs), quantized(fmt)
    assert layout.spec() == dict(COMPRESSED_NUMBERS.spec(fmt, SHAPE))
    assert layout.unpack(layout.pack(layer)).input_scale is None


def test_a_weight_of_whole_numbers_is_stored_as_before():
    fmt = int_format(4, 32, sym=True)
    layout, layer = LayerLayout(GPTQ_V1, fmt, SHAPE), quantized(fmt)
    assert layout.refuses() is None
    packed, alone = layout.pack(layer), GPTQ_V1.pack(layer.weight)
    assert packed.keys() == alone.keys()
    assert all(torch.equal(packed[name], alone[name]) for name in alone)


@pytest.mark.parametrize("case", CASES)
def test_a_missing_number_is_an_error(case):
    fmt, inputs, name, _ = CASES[case]
    layout = stored(fmt, inputs)
    with pytest.raises(InternalError, match="input"):
        layout.pack(quantized(fmt))
    parts = layout.pack(quantized(fmt, inputs))
    with pytest.raises(CheckpointError, match=name):
        layout.unpack({n: p for n, p in parts.items() if n != name})
    with pytest.raises(CheckpointError, match=name):
        layout.unpack({**parts, name: parts[name].double()})
    with pytest.raises(CheckpointError, match=name):
        layout.unpack({**parts, name: parts[name].repeat(2)})
