"""Activation formats: against plain Python, against compressed-tensors bit for bit, and their gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.errors import ConfigError
from auto_round.numerics.activation import ACTIVATIONS, TokenInt

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def activations(seed, dtype, shape=(2, 5, 48)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** torch.randn((*shape[:-1], 1), generator=generator)
    x[0, 0] = 0
    x[0, 1] = x[0, 1].abs()
    x[0, 2] = -x[0, 2].abs()
    return x.to(dtype)


def by_hand(token, bits, sym):
    """One token in double precision, as the format is described."""
    half = 2 ** (bits - 1)
    lo, hi = min(0.0, min(token)), max(0.0, max(token))
    step = max(-lo, hi) / (half - 0.5) if sym else (hi - lo) / (2 * half - 1)
    if step == 0:
        return [0.0] * len(token)
    zero = 0 if sym else max(-half, min(half - 1, round(-half - lo / step)))
    return [(max(-half, min(half - 1, round(v / step + zero))) - zero) * step for v in token]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_plain_python_gives_the_same_numbers(name):
    fmt = ACTIVATIONS[name]
    x = activations(1, torch.float64)
    wanted = torch.tensor([[by_hand(t, fmt.bits, fmt.sym) for t in row] for row in x.tolist()])
    torch.testing.assert_close(fmt.fake_quantize(x), wanted.to(torch.float64), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_compressed_tensors_gives_the_same_bits(name, dtype):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    fmt = ACTIVATIONS[name]
    args = QuantizationArgs(num_bits=fmt.bits, type="int", symmetric=fmt.sym, strategy="token", dynamic=True)
    for seed in range(5):
        x = activations(seed, dtype)
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
        assert torch.equal(fmt.fake_quantize(x), fake_quantize(x, scale, zero, args))


@given(
    name=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    shift=st.integers(-8, 4),
)
@settings(max_examples=40, deadline=None)
def test_properties(name, dtype, seed, shift):
    fmt = ACTIVATIONS[name]
    x = activations(seed, dtype).clamp(-2, 2)
    before = x.clone()
    y = fmt.fake_quantize(x)
    assert torch.equal(x, before)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert not y[0, 0].any()
    levels = y.sort(-1).values.diff(dim=-1).ne(0).sum(-1) + 1
    assert int(levels.max()) <= 2**fmt.bits
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fmt.fake_quantize(x[..., order]), y[..., order])
    assert torch.equal(fmt.fake_quantize(x.flip(1)), y.flip(1))  # tokens know nothing of each other
    if dtype is not torch.float16:  # whose small numbers are subnormal
        assert torch.equal(fmt.fake_quantize(x * 2.0**shift), y * 2.0**shift)


def test_eight_bits_are_nearly_exact_and_four_are_not():
    x = activations(3, torch.float32)
    extreme = x.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    error = {bits: ((TokenInt(bits, sym=True).fake_quantize(x) - x) / extreme).abs().max() for bits in (8, 4)}
    assert 1e-3 < error[8] < 0.6 / 127
    assert 0.03 < error[4] < 0.6 / 7


def test_one_token_alone_is_what_it_is_in_a_batch():
    x = activations(4, torch.bfloat16)
    fmt = TokenInt(8, sym=True)
    assert torch.equal(fmt.fake_quantize(x)[1, 3], fmt.fake_quantize(x[1, 3]))


@pytest.mark.parametrize("name", ["int8_token_sym", "int4_token_asym"])
def test_the_gradient_passes_straight_through(name):
    x = activations(5, torch.float32).requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    (ACTIVATIONS[name].fake_quantize(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(ConfigError, match="act_bits"):
        TokenInt(bits, sym=True)
