"""FP8 products by PyTorch: shapes, steps and codes, tested with the same operator on a CPU.

What a GPU makes of them is not tested here: kinds of layers are tried there before they are trusted.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round.kernels.check import _is_right, trial
from auto_round.kernels.kernel import INPUT, LinearSpec, rounded_input
from auto_round.kernels.scaled_mm import ScaledMmKernel
from auto_round.kernels.select import select_kernel
from auto_round.kernels.table import KERNELS
from auto_round.numerics.activation_float import CalibratedScale, MeasuredScales
from auto_round.numerics.group import Group
from auto_round.numerics.presets import int_format
from auto_round.numerics.presets_float import fp8_format, mx_format, nv_format
from auto_round.numerics.qtensor import QTensor

KERNEL = ScaledMmKernel(device="cpu")
SHAPE = (48, 64)
INPUTS = {
    "static": CalibratedScale(fp8_format(Group(0), scale_dtype=torch.bfloat16)),
    "token": MeasuredScales(fp8_format(Group(-1))),
    "tensor": MeasuredScales(fp8_format(Group(0))),
}
WEIGHTS = {"row": fp8_format(Group(-1), scale_dtype=torch.bfloat16), "tensor": fp8_format(Group(0))}


def layer(weight="row", rounded="static", **changes):
    spec = LinearSpec(WEIGHTS[weight], SHAPE, torch.bfloat16, "cpu", INPUTS[rounded])
    return dataclasses.replace(spec, **changes)


def case(spec):
    g = torch.Generator().manual_seed(0)
    q = spec.fmt.quantize(torch.randn(spec.shape, generator=g) * torch.rand(spec.shape[0], 1, generator=g))
    buffers = dict(KERNEL.prepare(q, spec))
    if isinstance(spec.inputs, CalibratedScale):
        buffers[INPUT] = spec.inputs.fixed(2.5).number
    return q, buffers


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_result_is_the_exact_one_rounded_once(weight, inputs):
    spec = layer(weight, inputs)
    q, buffers = case(spec)
    w = spec.fmt.dequantize(q).double()
    for shape in ((1,), (3, 5), (2, 17)):
        x = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        exact = rounded_input(x.float(), buffers, spec).double() @ w.t()
        got = KERNEL.linear(x, buffers, spec, None)
        assert (got.dtype, got.shape) == (torch.bfloat16, (*shape, 48))
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)
        bias = torch.arange(48.0).bfloat16()
        assert torch.equal(KERNEL.linear(x, buffers, spec, bias), got + bias)


@pytest.mark.parametrize("inputs", INPUTS)
def test_codes_are_those_of_the_activation_format(inputs):
    """Every bfloat16 number of usual size, larger ones saturated: codes times steps are what was tuned."""
    from auto_round.kernels.scaled_mm import _input_format, _to_codes

    spec = layer(rounded=inputs)
    _, buffers = case(spec)
    bits = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16).float()
    tokens = bits[bits.isfinite() & (bits.abs() < 1e4)]
    tokens = tokens[: len(tokens) // 64 * 64].reshape(-1, 64)
    step = _input_format(spec, buffers).step(tokens)
    assert torch.equal(_to_codes(tokens, step).float() * step, rounded_input(tokens, buffers, spec))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_weight_comes_back(weight):
    spec = layer(weight)
    q, buffers = case(spec)
    back = KERNEL.restore(buffers, spec)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale.parts["step"], q.scale.parts["step"])
    assert sum(b.nbytes for b in KERNEL.prepare(q, spec).values()) <= 48 * 64 + 48 * 4


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_it_passes_the_trial_and_wrong_ones_do_not(weight, inputs):
    spec = layer(weight, inputs)
    assert trial(KERNEL, spec) is None

    class TokensShifted(ScaledMmKernel):
        def linear(self, x, buffers, spec, bias):
            return super().linear(x, buffers, spec, bias).roll(1, 0)

    class StepsShifted(ScaledMmKernel):
        def prepare(self, q, spec):
            parts = {"step": q.scale.parts["step"].roll(1, 0) * 1.05}
            return super().prepare(QTensor(q.codes, q.format.rule.read(parts), q.format), spec)

    for wrong in (TokensShifted, StepsShifted):
        assert not _is_right(wrong(device="cpu"), spec)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "xpu"}, "runs on cpu"),
        ({"inputs": None}, "left alone"),
        ({"inputs": MeasuredScales(mx_format("fp8"))}, "mxfp8_measured"),
        ({"inputs": CalibratedScale(nv_format())}, "nvfp4"),
        ({"fmt": fp8_format(Group(32))}, "each row"),
        ({"fmt": fp8_format(Group(128, 128))}, "each row"),
        ({"fmt": int_format(8, -1, sym=True)}, "FP8 weights"),
        ({"dtype": torch.float16}, "bfloat16"),
        ({"shape": (40, 64)}, "multiples of 16"),
    ],
)
def test_what_it_refuses(changes, said):
    assert said in KERNEL.refuses(layer(**changes)).reason


def test_it_is_a_row_of_the_table_that_is_tried_first():
    entry = KERNELS["fp8_scaled_mm"]
    assert entry.tried
    assert entry.inputs
    assert entry.priority > KERNELS["torch"].priority
    assert select_kernel(layer()).name in ("cpu_float", "torch")  # the row is for GPUs
    if not torch.cuda.is_available():
        assert "none is here" in entry.kernel.refuses(entry.sample).reason
