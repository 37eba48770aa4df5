"""Products of a rounded matrix with few tokens, row by row: those of the rounded matrix as a tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round import compiled
from auto_round.numerics import compiled_rounding
from auto_round.numerics.compiled_rounding import FEW_TOKENS, CompiledRounding
from auto_round.numerics.presets import GGUF_FORMATS, int_format
from auto_round.testing.format_kit import random_case

pytestmark = pytest.mark.skipif(not compiled_rounding._multiplies(), reason="no such products on this CPU")

FORMATS = {
    "symmetric": int_format(4, 32, sym=True),
    "zero points": int_format(2, 64, sym=False),
    "rows": int_format(4, -1, sym=True),
    "floors": GGUF_FORMATS["q4_1"],
    "short last group": int_format(4, 160, sym=False),
    "symmetric, short last group": int_format(4, 160, sym=True),
}


def made(name, shape, seed, dtype=torch.bfloat16):
    """The rounding of a random matrix."""
    fmt = FORMATS[name]
    case = random_case(fmt, shape, seed, dtype, 0.7)
    stats = fmt.stats(case.w)
    scale = fmt.rule_for(stats).fit(stats, fmt.grid, case.knobs)
    return CompiledRounding(fmt.grid, fmt.group, case.w, case.v, scale)


def whole(tokens, width, seed):
    """Small whole numbers: sums of their products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (tokens, width), generator=generator).bfloat16()


def assert_product(got, a, b):
    """Within the rounding of the product to bfloat16, and of its sum in float32."""
    want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-5 * size).all()


@given(
    name=st.sampled_from(list(FORMATS)),
    tokens=st.integers(1, FEW_TOKENS),
    shape=st.sampled_from([(4, 160), (20, 320), (36, 608)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    outside=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_products_and_what_is_learned_of_them(name, tokens, shape, dtype, outside, seed):
    own, other = (made(name, shape, seed, dtype) for _ in range(2))
    x, grad = whole(tokens, shape[1], seed), whole(tokens, shape[0], seed + 1)
    weights = own.weights(torch.bfloat16)
    out, to_x = torch.empty(tokens, shape[0]).bfloat16(), torch.empty_like(x)
    assert own.multiplies(x)
    own.multiply(x, out)
    assert_product(out, x, weights.T)
    found = own.learn(grad, x, to_x, steps=True, outside=outside, move=0.01)
    assert_product(to_x, grad, weights)
    gradient = (grad.double().T @ x.double()).bfloat16()
    want = other.slopes(gradient, steps=True, outside=outside, move=0.01)
    assert torch.equal(own.v, other.v)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_only_what_is_wanted_is_found():
    own = made("zero points", (8, 128), 0)
    before = own.v.clone()
    given = whole(2, 8, 1), whole(2, 128, 2), None
    assert own.learn(*given, steps=False, outside=False, move=0.01) == (None, None)
    assert not torch.equal(own.v, before)
    to_step, outside = own.learn(*given, steps=False, outside=True, move=0.01)
    assert to_step is None
    assert outside.shape == own.scale.step.shape


@pytest.mark.parametrize("name", FORMATS)
def test_results_do_not_depend_on_threads(monkeypatch, name):
    generator, threads = torch.Generator().manual_seed(1), torch.get_num_threads()
    x, grad = (torch.randn(11, width, generator=generator).bfloat16() for width in (352, 64))
    results = []
    monkeypatch.setattr(compiled, "FEW", 0)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            own, out, to_x = made(name, (64, 352), 5), torch.empty(11, 64).bfloat16(), torch.empty_like(x)
            own.multiply(x, out)
            found = own.learn(grad, x, to_x, steps=True, outside=True, move=0.01)
            results.append([out, to_x, own.v, *found])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_the_program_does_not_multiply_is_left_to_pytorch():
    own = made("symmetric", (8, 64), 0)
    assert own.multiplies(whole(2, 64, 0))
    assert not own.multiplies(whole(2, 64, 0).float())
    assert not own.multiplies(whole(FEW_TOKENS + 1, 64, 0))
    assert not made("symmetric", (6, 64), 0).multiplies(whole(2, 64, 0))
    assert not made("symmetric", (8, 80), 0).multiplies(whole(2, 80, 0))
    narrow = int_format(4, 16, sym=True)
    w = torch.ones(8, 64).bfloat16()
    assert not CompiledRounding(narrow.grid, narrow.group, w, None, narrow.quantize(w).scale).multiplies(
        whole(2, 64, 0)
    )
