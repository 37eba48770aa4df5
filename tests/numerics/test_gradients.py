"""Gradients of `fake_quantize` against the formulas written plainly and left to autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.numerics.presets import int_format
from auto_round.numerics.scale import Knobs
from auto_round.numerics.ste import cast_ste, clamp_ste, round_ste
from auto_round.testing.format_kit import random_case, random_weight

N_GROUPS, WIDTH = 3, 16


def through(value, x):
    """Forward `value`, backward as if it were `x`."""
    return x + (value - x).detach()


def saturated(n, lo, hi):
    """`n.clamp(lo, hi)` with a gradient of 1 at the ends, which not every version of PyTorch gives."""
    return torch.where((n < lo) | (n > hi), n.detach().clamp(lo, hi), n)


def plain(w, lo_knob, hi_knob, v, bits, sym, dtype):
    """Straight-through quantization of `[rows, n_groups, width]`, by autograd alone, in float64.

    Only what has to be rounded as float32 does it is taken from there: which way each number goes.
    """
    lo = -w.amin(-1, keepdim=True).clamp_max(0) * lo_knob.unsqueeze(-1)
    hi = w.amax(-1, keepdim=True).clamp_min(0) * hi_knob.unsqueeze(-1)
    if sym:
        top = 1 << (bits - 1)
        exact = torch.where(hi < lo, lo, -hi) / top
        step = through(exact.to(dtype).double(), exact)
        n = w / step + v
        n = saturated(through(n.round(), n), -top, top - 1)
        return n * step
    top = (1 << bits) - 1
    exact = (hi + lo) / top
    step = through(exact.to(dtype).double(), exact)
    zero = through((lo / step).round(), lo / step)
    n = w / step + v
    n = saturated(through(n.round(), n) + zero, 0, top)
    return (n - zero) * step


@given(
    bits=st.integers(2, 8),
    sym=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_gradients_are_those_of_the_straight_through_estimate(bits, sym, dtype, seed):
    fmt = int_format(bits, WIDTH, sym=sym, scale_dtype=dtype)
    case = random_case(fmt, (4, N_GROUPS * WIDTH), seed)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(case.w.shape, generator=generator)
    ours = [t.clone().requires_grad_() for t in (case.knobs.lo, case.knobs.hi, case.v)]
    out = fmt.fake_quantize(case.w, fmt.stats(case.w), Knobs(*ours[:2]), ours[2])
    got = torch.autograd.grad((out * upstream).sum(), ours)

    theirs = [t.double().requires_grad_() for t in (case.knobs.lo, case.knobs.hi, case.v)]
    grouped = (4, N_GROUPS, WIDTH)
    want_out = plain(
        case.w.double().reshape(grouped), *theirs[:2], theirs[2].reshape(grouped), bits, sym, dtype
    )
    want_out = want_out.reshape(case.w.shape)
    want = torch.autograd.grad((want_out * upstream).sum(), theirs)

    # float32 and float64 may decide a near tie differently: such groups (rare) say nothing about gradients.
    same = (out - want_out).abs().reshape(grouped).amax(-1) < 1e-4
    assert same.float().mean() > 0.8
    for g, w in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(g[same].double(), w[same], rtol=1e-3, atol=1e-3)
    each = same.unsqueeze(-1).expand(grouped).reshape(case.w.shape)
    torch.testing.assert_close(got[2][each].double(), want[2][each], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sym", [True, False])
def test_saturated_weights_get_no_gradient_of_their_offset(sym):
    fmt = int_format(4, 8, sym=sym)
    w = torch.linspace(-1, 1, 16).reshape(2, 8)
    ones = torch.ones(fmt.group.scale_shape(w.shape))
    v = torch.where(torch.arange(16).reshape(2, 8) % 2 == 0, 0.0, 40.0).requires_grad_()
    fmt.fake_quantize(w, fmt.stats(w), Knobs(ones, ones), v).sum().backward()
    assert (v.grad[:, 1::2] == 0).all()
    assert (v.grad[:, ::2] != 0).all()


@pytest.mark.parametrize("sym", [True, False])
def test_nothing_flows_where_nothing_is_asked_for(sym):
    fmt = int_format(4, 16, sym=sym)
    w = random_weight((2, 32), 0).requires_grad_()
    ones = torch.ones(fmt.group.scale_shape(w.shape))
    assert not fmt.fake_quantize(w.detach(), fmt.stats(w.detach()), Knobs(ones, ones), None).requires_grad
    v = torch.zeros(2, 32, requires_grad=True)
    out = fmt.fake_quantize(w, fmt.stats(w.detach()), Knobs(ones, ones), v)
    gradient_w, gradient_v = torch.autograd.grad(out.sum(), [w, v], allow_unused=True)
    assert gradient_w is None
    assert gradient_v is not None
    assert not fmt.quantize(w).scale.step.requires_grad


def test_straight_through_operations_are_exact_forward_and_identity_backward():
    x = torch.tensor([0.5, 1.5, -2.5, 1e-9, 8388607.5, 2049.0, 1e6], requires_grad=True)
    assert round_ste(x).tolist() == [0, 2, -2, 0, 8388608, 2049, 1e6]
    assert cast_ste(x, torch.float16).tolist()[5:] == [2048, torch.inf]
    for operation in (round_ste, lambda t: cast_ste(t, torch.bfloat16)):
        (gradient,) = torch.autograd.grad(operation(x).sum(), x)
        assert gradient.tolist() == [1] * 7


def test_the_ends_of_a_range_may_be_left_again():
    """PyTorch 2.15 gives numbers at the ends no gradient, and zero points and multiples lie there often."""
    x = torch.tensor([-1.0, 0.0, 1.5, 3.0, 4.0, torch.inf], requires_grad=True)
    held = clamp_ste(x, 0, 3)
    assert torch.equal(held, x.detach().clamp(0, 3))
    (gradient,) = torch.autograd.grad(held.sum(), x)
    assert gradient.tolist() == [0, 1, 1, 1, 0, 0]
    assert not clamp_ste(x.detach(), 0, 3).requires_grad
