"""Steps of symmetric formats by the C program: every bit of what PyTorch computes, gradients too."""

from __future__ import annotations

import pytest
import torch

from auto_round.numerics import compiled_signed_max, scale_integer
from auto_round.numerics.compiled_signed_max import compiled_step
from auto_round.numerics.presets import int_format
from auto_round.numerics.scale import Knobs, Stats
from auto_round.numerics.scale_integer import SignedMax

needs_program = pytest.mark.skipif(compiled_signed_max._program() is None, reason="no C compiler")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def made_up(dtype):
    """Ranges of all sizes, of one side only, of nothing, alike, and at the ends of the dtype; knobs."""
    generator = torch.Generator().manual_seed(0)
    info, count = torch.finfo(dtype), 4096
    size = 10.0 ** torch.empty(2, count).uniform_(-44, 38, generator=generator)
    size[:, : count // 2] = torch.rand(2, count // 2, generator=generator)
    lo, hi = -size[0], size[1]
    lo[::7], hi[3::7] = 0.0, 0.0
    lo[::21] = hi[::21] = 0.0
    hi[5::11] = -lo[5::11]
    knobs = [torch.rand(count, generator=generator) * 1.5 for _ in range(2)]
    smallest = info.smallest_normal * info.eps
    for i, step in enumerate((smallest / 2, smallest, smallest * 0.51, info.max, info.max * 1.01)):
        lo[-1 - i] = -min(step * 8, torch.finfo(torch.float32).max)
        hi[-1 - i], knobs[0][-1 - i] = 0.0, 1.0
    knobs[0][2::13], knobs[1][4::13] = 0.0, 0.0
    shape = (4, 64, 16)
    return Stats(lo.view(shape), hi.view(shape)), Knobs(*(k.view(shape) for k in knobs))


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def fitted(rule, grid, stats, knobs):
    """Stored steps without and with knobs, and the step and gradients of autograd."""
    lo, hi = (k.clone().requires_grad_() for k in (knobs.lo, knobs.hi))
    plain, stored = rule.fit(stats, grid), rule.fit(stats, grid, knobs)
    step = rule.fit(stats, grid, Knobs(lo, hi)).step
    grad = torch.randn(step.shape, generator=torch.Generator().manual_seed(1))
    return [plain.step, stored.step, step.detach(), *torch.autograd.grad(step, (lo, hi), grad)]


@needs_program
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_is_that_of_pytorch(dtype, bits, monkeypatch):
    rule, grid = SignedMax(dtype), int_format(bits, 128, sym=True).grid
    stats, knobs = made_up(dtype)
    assert compiled_step(stats, -grid.lo, knobs, dtype) is not None
    found = fitted(rule, grid, stats, knobs)
    monkeypatch.setattr(scale_integer, "compiled_step", lambda *_: None)
    expected = fitted(rule, grid, stats, knobs)
    for ours, theirs in zip(found, expected, strict=True):
        assert same_bits(ours, theirs)
    assert rule.fit(stats, grid).parts["step"].dtype is dtype


@needs_program
def test_a_gradient_of_one_side_only():
    stats, knobs = made_up(torch.float16)
    lo = knobs.lo.clone().requires_grad_()
    step = compiled_step(stats, 8.0, Knobs(lo, knobs.hi), torch.float16)
    (to_lo,) = torch.autograd.grad(step.sum(), lo)
    assert to_lo.count_nonzero() > 1000


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda x: x.to("meta"), lambda x: x[..., ::2]])
def test_what_the_program_does_not_do_is_left_to_pytorch(change):
    stats, knobs = made_up(torch.float16)
    assert compiled_step(Stats(change(stats.lo), change(stats.hi)), 8.0, None, torch.float16) is None
    other = Knobs(change(knobs.lo), change(knobs.hi))
    assert compiled_step(stats, 8.0, other, torch.float16) is None
