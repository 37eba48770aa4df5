"""Codes that stay while the steps of their groups change."""

from __future__ import annotations

import pytest
import torch

from auto_round.numerics.presets import int_format
from auto_round.numerics.presets_float import mx_format, nv_format
from auto_round.numerics.scale import Knobs

FORMATS = {
    "int2": int_format(2, 16, sym=True),
    "int4 with zero points": int_format(4, 16, sym=False),
    "mxfp4": mx_format("fp4"),
    "nvfp4": nv_format(),
}


@pytest.fixture(params=FORMATS)
def case(request):
    fmt = FORMATS[request.param]
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    stats = fmt.stats(w)
    bound = fmt.bind(stats)
    knobs = Knobs(torch.full_like(stats.lo, 0.9), torch.full_like(stats.hi, 0.8))
    return bound, stats, knobs, bound.quantize(w, knobs)


def equal(a, b):
    return torch.equal(a.codes, b.codes) and all(
        torch.equal(a.scale.parts[name], part) for name, part in b.scale.parts.items()
    )


def test_the_same_knobs_give_the_same_tensor(case):
    fmt, stats, knobs, q = case
    assert equal(fmt.rescale(q, stats, knobs), q)


def test_the_fake_one_is_the_real_one_bit_for_bit(case):
    fmt, stats, knobs, q = case
    wider = Knobs((knobs.lo * 1.3).requires_grad_(), (knobs.hi * 1.3).requires_grad_())
    fake = fmt.fake_rescale(q, stats, wider)
    with torch.no_grad():
        real = fmt.rescale(q, stats, wider)
    assert torch.equal(fake.detach(), fmt.dequantize(real))
    assert torch.equal(real.codes, q.codes)
    assert (real.scale.step.abs() > q.scale.step.abs()).all() or "mx" in fmt.name
    if q.scale.zero is not None:
        assert torch.equal(real.scale.zero, q.scale.zero)
    lo, hi = torch.autograd.grad(fake.sum(), (wider.lo, wider.hi))
    assert (lo != 0).any() or (hi != 0).any()
