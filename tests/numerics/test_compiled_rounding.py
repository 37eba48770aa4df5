"""The compiled rounding: every bit of what PyTorch computes, for all kinds of scales, shapes and threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round import compiled
from auto_round.numerics import compiled_rounding, format
from auto_round.numerics.group import Group
from auto_round.numerics.presets import GGUF_FORMATS, int_format
from auto_round.numerics.presets_float import fp8_format
from auto_round.numerics.scale import Knobs, Scale
from auto_round.testing.format_kit import random_case

needs_program = pytest.mark.skipif(compiled_rounding._program() is None, reason="no C compiler")

FORMATS = {
    "symmetric": int_format(4, 32, sym=True),
    "zero points": int_format(2, 16, sym=False),
    "short last group": int_format(3, 20, sym=False),
    "rows": int_format(8, -1, sym=True),
    "floors": GGUF_FORMATS["q4_1"],
    "steps of two levels": GGUF_FORMATS["q3_k"],
    "floors of two levels": GGUF_FORMATS["q4_k"],
}


@pytest.fixture
def by_torch(monkeypatch):
    """Calls a function without the program."""

    def call(function):
        with monkeypatch.context() as without:
            without.setattr(compiled_rounding, "_program", lambda: None)
            return function()

    return call


def bits(x):
    return x.contiguous().view(torch.int32) if x.dtype is torch.float32 else x


def everything(fmt, w, knobs, v, grad):
    """Codes, rounded weights, and gradients of all that can be learned."""
    stats = fmt.stats(w)
    q = fmt.quantize(w, knobs, v, stats)
    learned = [x.clone().requires_grad_() for x in (v, knobs.lo, knobs.hi) if x is not None]
    lo, hi = learned[-2:]
    fake = fmt.fake_quantize(w, stats, Knobs(lo, hi), learned[0] if v is not None else None)
    slopes = torch.autograd.grad(fake, learned, grad, allow_unused=True)
    return [bits(x) for x in (q.codes, fake.detach(), *slopes) if x is not None]


@needs_program
@given(
    name=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.sampled_from([(1, 256), (5, 512), (2, 3, 256)]),
    offsets=st.booleans(),
    reach=st.sampled_from([0.6, 4.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_all_bits_are_those_of_pytorch(name, dtype, shape, offsets, reach, seed):
    fmt = FORMATS[name]
    case = random_case(fmt, shape, seed, dtype, reach)
    v = case.v if offsets else None
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    own = everything(fmt, case.w, case.knobs, v, grad)
    with pytest.MonkeyPatch.context() as without:
        without.setattr(compiled_rounding, "_program", lambda: None)
        want = everything(fmt, case.w, case.knobs, v, grad)
    assert len(own) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(own, want, strict=True))


@needs_program
@given(
    name=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    made=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_weights_and_gradients_of_half_the_width_are_those_that_pytorch_casts(name, dtype, made, seed):
    fmt = FORMATS[name]
    case = random_case(fmt, (5, 512), seed, dtype, 1.5)
    w = case.w * torch.cat([torch.ones(4, 1), torch.full((1, 1), 1e-38)]).to(dtype)  # subnormal ones too
    stats = fmt.stats(w)
    scale = fmt.rule_for(stats).fit(stats, fmt.grid, case.knobs)
    want = fmt.rounded(w, scale, case.v)
    assert torch.equal(bits(fmt.rounded_in(w, scale, case.v, made).float()), bits(want.to(made).float()))
    narrow = torch.randn(5, 512, generator=torch.Generator().manual_seed(seed)).bfloat16()
    found = []
    for grad in (narrow, narrow.float()):
        v = case.v.clone()
        asked = compiled_rounding.compiled_rounding(fmt.grid, fmt.group, w, v, scale)
        found.append([v, *asked.slopes(grad, steps=True, outside=True, move=0.01)])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_program
@pytest.mark.parametrize("width", [16, 20, 37, 511, 512, 513, 4357, 140_003])
def test_groups_of_any_width_are_added_up_as_pytorch_does(by_torch, one_thread, width):
    """As it does with one thread: several share a long sum where there are fewer sums than threads."""
    fmt = int_format(4, -1, sym=False)
    case = random_case(fmt, (2, width), width)
    grad = torch.randn(2, width, generator=torch.Generator().manual_seed(width))
    check = lambda: everything(fmt, case.w, case.knobs, case.v, grad)  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(check(), by_torch(check), strict=True))


@needs_program
@pytest.mark.parametrize("fmt", [int_format(4, 32, sym=True), int_format(4, 32, sym=False)])
def test_ties_ends_and_signs_of_zero_are_those_of_pytorch(by_torch, fmt):
    w = torch.cat([torch.arange(-32, 32) / 4, -torch.zeros(32), torch.full((32,), 1e-30)]).reshape(1, -1)
    knobs = Knobs(*(torch.full((1, 4), 0.5) for _ in range(2)))
    for v in (None, torch.full_like(w, 0.5), torch.full_like(w, -0.0)):
        check = lambda v=v: everything(fmt, w, knobs, v, torch.ones_like(w))  # noqa: E731
        assert all(torch.equal(a, b) for a, b in zip(check(), by_torch(check), strict=True))


@needs_program
def test_only_what_is_wanted_is_differentiated(by_torch):
    fmt = int_format(4, 32, sym=False)
    case = random_case(fmt, (4, 64), 0)
    stats = fmt.stats(case.w)

    def slope_of_offsets():
        v = case.v.clone().requires_grad_()
        fmt.fake_quantize(case.w, stats, case.knobs, v).square().sum().backward()
        return v.grad

    assert torch.equal(slope_of_offsets(), by_torch(slope_of_offsets))


@needs_program
def test_results_do_not_depend_on_threads_or_on_default_dtypes(monkeypatch):
    fmt = int_format(4, 32, sym=False)
    case = random_case(fmt, (67, 544), 3, torch.bfloat16)
    check = lambda: everything(fmt, case.w, case.knobs, case.v, torch.ones(67, 544))  # noqa: E731
    want, threads = check(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(compiled, "FEW", 0)
        assert all(torch.equal(a, b) for a, b in zip(check(), want, strict=True))
        torch.set_default_dtype(torch.bfloat16)
        own = fmt.quantize(case.w, case.knobs, case.v).codes
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert torch.equal(own, want[0])


def used(fmt, w, v=None):
    stats = fmt.stats(w)
    scale = fmt.rule_for(stats).fit(stats, fmt.grid)
    return compiled_rounding.compiled_rounding(fmt.grid, fmt.group, w, v, scale) is not None


@needs_program
def test_what_the_program_does_not_know_is_left_to_pytorch():
    fmt, w = int_format(4, 32, sym=True), torch.ones(8, 64)
    assert used(fmt, w)
    assert used(fmt, torch.nn.Parameter(w.bfloat16(), requires_grad=False), torch.zeros(8, 64))
    assert not used(fmt, w.half())
    assert not used(fmt, torch.ones(64, 8).T)
    assert not used(fmt, w, torch.zeros(8, 64, dtype=torch.float64))
    assert not used(fmt, w, torch.zeros(64, 8).T)
    assert not used(int_format(4, 0, sym=True), w)
    assert not used(fp8_format(Group(-1)), w)
    assert not used(int_format(4, 8, sym=True), w)
    narrow = Scale(torch.ones(8, 2, dtype=torch.float16), None)
    assert compiled_rounding.compiled_rounding(fmt.grid, fmt.group, w, None, narrow) is None


@needs_program
def test_formats_of_whole_numbers_use_the_program(monkeypatch):
    asked = []
    monkeypatch.setattr(
        format,
        "compiled_rounding",
        lambda *a: asked.append(compiled_rounding.compiled_rounding(*a)) or asked[-1],
    )
    fmt, w = int_format(4, 32, sym=True), torch.ones(8, 64)
    fmt.quantize(w)
    fmt.fake_quantize(w, fmt.stats(w), None, None)
    assert len(asked) == 2
    assert None not in asked
