"""Whole-number inputs with a calibrated step: against plain Python, and compressed-tensors bit for bit."""

from __future__ import annotations

import pytest
import torch

from auto_round.numerics.activation_int import tensor_int

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def activations(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((3, 7, 64), generator=generator) * 3 + 1
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_gives_the_same_bits(bits, sym, dtype):
    """Also where inputs are larger than what calibration saw."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    args = QuantizationArgs(num_bits=bits, type="int", symmetric=sym, strategy="tensor", dynamic=False)
    for seed, share in enumerate((1.0, 0.25)):
        x = activations(seed, dtype)
        seen = x.float() * share
        fixed = tensor_int(bits, sym=sym).stored_in(dtype).fixed(float(seen.max()), float(seen.min()))
        zero = torch.zeros(1, dtype=torch.int8) if fixed.zero is None else fixed.zero
        assert fixed.number.dtype is dtype
        assert torch.equal(fixed.fake_quantize(x), fake_quantize(x, fixed.number, zero, args))


@pytest.mark.parametrize(("least", "largest"), [(-3.0, 9.0), (-9.0, 3.0), (0.0, 2.0), (-2.0, 0.0)])
def test_codes_reach_from_the_least_to_the_largest(least, largest):
    fixed = tensor_int(8, sym=False).fixed(largest, least)
    step, zero = float(fixed.number), int(fixed.zero)
    assert step == pytest.approx((largest - least) / 255)
    assert zero == round(-128 - least / step)
    x = torch.linspace(least - 1, largest + 1, 1001)
    wanted = [(max(-128, min(127, round(v / step + zero))) - zero) * step for v in x.tolist()]
    torch.testing.assert_close(fixed.fake_quantize(x), torch.tensor(wanted), rtol=1e-5, atol=1.01 * step)
    inside = (x >= least) & (x <= largest)
    assert float((fixed.fake_quantize(x) - x)[inside].abs().max()) <= 0.5001 * step
    assert fixed.fake_quantize(torch.zeros(1)) == 0


def test_symmetric_steps_bring_the_larger_side_to_the_top():
    for largest, least in ((10.0, -2.0), (2.0, -10.0)):
        fixed = tensor_int(8, sym=True).fixed(largest, least)
        assert fixed.zero is None
        assert torch.equal(fixed.number, torch.tensor([10.0]) / 127)
        assert float(fixed.fake_quantize(torch.tensor([10.0]))) == pytest.approx(10.0)
        assert float(fixed.fake_quantize(torch.tensor([1000.0]))) == pytest.approx(10.0)


@pytest.mark.parametrize("sym", [True, False])
def test_inputs_of_zeros_have_a_step_too(sym):
    fixed = tensor_int(8, sym=sym).fixed(0.0, 0.0)
    assert fixed.number > 0
    assert not fixed.fake_quantize(torch.zeros(2, 4)).any()


def test_the_gradient_passes_straight_through():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (tensor_int(8, sym=False).fixed(1.0, -0.5).fake_quantize(x) * 3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))
