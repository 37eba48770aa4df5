"""Formats of inputs with a calibrated scale: against plain Python, and compressed-tensors bit for bit."""

from __future__ import annotations

import pytest
import torch

from auto_round.numerics.activation_float import CalibratedScale
from auto_round.numerics.group import Group
from auto_round.numerics.presets_float import fp8_format, nv_format

FP8, NVFP4 = CalibratedScale(fp8_format(Group(0))), CalibratedScale(nv_format(measured=True))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def activations(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((3, 7, 64), generator=generator) * 10 ** torch.randn((3, 7, 1), generator=generator)
    x[0, 0] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("above", [1.0, 0.25, 2.0**16, 2.0**19])
def test_compressed_tensors_gives_the_same_bits_for_nvfp4(dtype, above):
    """Also where inputs are larger than what calibration saw, or so small that a group's number is 0."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        dynamic="local",
        scale_dtype=torch.float8_e4m3fn,
    )
    for seed in range(5):
        x = activations(seed, dtype)
        fixed = NVFP4.fixed(float(x.abs().max()) * above)
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), global_scale=fixed.number)
        theirs = fake_quantize(x, scale, zero, args, global_scale=fixed.number)
        assert torch.equal(fixed.fake_quantize(x), theirs)


def test_fp8_in_plain_python():
    fmt = FP8.stored_in(torch.bfloat16).fixed(10.0)
    step = float(torch.tensor(10.0 / 448).bfloat16())
    assert fmt.number.dtype is torch.bfloat16
    assert float(fmt.number) == step
    x = torch.tensor([[0.0, 1.0, -3.3, 10.0, 11.0, -500.0]])
    codes = (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(fmt.fake_quantize(x), codes * step)
    assert float(fmt.fake_quantize(x)[0, -1]) == -448 * step  # saturates


def test_nvfp4_in_plain_python():
    fmt = NVFP4.fixed(8.0)
    assert fmt.number.dtype is torch.float32
    assert float(fmt.number) == 448 * 6 / 8
    x = torch.linspace(-4, 8, 16)[None]
    step = float(torch.tensor(8 / 6 * (448 * 6 / 8)).to(torch.float8_e4m3fn)) / (448 * 6 / 8)
    nearest = [
        min((s * e for e in E2M1 for s in (-1, 1)), key=lambda n: abs(n - v / step)) for v in x[0].tolist()
    ]
    torch.testing.assert_close(fmt.fake_quantize(x)[0], torch.tensor(nearest) * step)


def test_tokens_know_nothing_of_each_other():
    x = activations(3)
    for fmt in (FP8.fixed(2.0), NVFP4.fixed(2.0)):
        y = fmt.fake_quantize(x)
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert torch.equal(fmt.fake_quantize(x[1, 2]), y[1, 2])
        assert torch.equal(fmt.fake_quantize(y), y) or fmt.bits == 4


def test_the_gradient_passes_straight_through():
    x = activations(5, torch.float32).requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    (NVFP4.fixed(1.0).fake_quantize(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_inputs_of_zeros_have_a_number_too():
    for fmt in (FP8.fixed(0.0), NVFP4.fixed(0.0)):
        assert bool(torch.isfinite(fmt.number).all())
        assert not fmt.fake_quantize(torch.zeros(2, 32)).any()
        assert bool(torch.isfinite(fmt.fake_quantize(torch.ones(2, 32))).all())
