"""The range search: never worse than the measured range, close to the best of a fine grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.numerics.format import CHUNK
from auto_round.numerics.importance import Importance
from auto_round.numerics.presets import int_format
from auto_round.numerics.scale import Knobs
from auto_round.numerics.search import QUICK, THOROUGH, search_knobs
from auto_round.testing.format_kit import random_weight


def errors(fmt, w, knobs, importance=None):
    """Weighted squared error of each group, float64 `[..., rows, n_groups]`."""
    square = (fmt.dequantize(fmt.quantize(w, knobs)).double() - w.double()).square()
    if importance is not None:
        square = square * importance
    return fmt.group.split(square).sum(-1)


def weighed(squares):
    return None if squares is None else Importance(squares)


def measured(fmt, w):
    ones = torch.ones(fmt.group.scale_shape(w.shape))
    return Knobs(ones, ones)


@given(
    bits=st.integers(2, 8),
    sym=st.booleans(),
    group=st.sampled_from([-1, 0, 8, 32, 48]),
    effort=st.sampled_from([QUICK, THOROUGH]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_never_worse_than_the_measured_range(bits, sym, group, effort, weighted, seed):
    fmt = int_format(bits, group, sym=sym)
    w = random_weight((6, 80), seed)
    importance = torch.rand(80, generator=torch.Generator().manual_seed(seed)) + 0.01 if weighted else None
    found = errors(fmt, w, search_knobs(fmt, w, weighed(importance), effort), importance)
    plain = errors(fmt, w, measured(fmt, w), importance)
    assert (found <= plain * (1 + 1e-4) + 1e-12).all()


def brute_force(fmt, w, importance):
    """Least error of each group over a fine grid of ranges, of either sign for symmetric formats."""
    shape = fmt.group.scale_shape(w.shape)
    sweep = torch.linspace(0.3, 1.2, 61).tolist()
    if fmt.grid.lo < 0:
        pairs = [(m, 0.0) for m in torch.linspace(0.02, 4, 600).tolist()]
        pairs += [(0.0, m) for m, _ in pairs]
    else:
        pairs = list(itertools.product(sweep, sweep))
    tried = [errors(fmt, w, Knobs(torch.full(shape, a), torch.full(shape, b)), importance) for a, b in pairs]
    return torch.stack(tried).amin(0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("bits", "sym"), [(2, True), (2, False), (3, True), (4, True), (4, False)])
def test_near_the_best_of_a_fine_grid(bits, sym, weighted):
    fmt = int_format(bits, 16, sym=sym)
    w = torch.randn(24, 32, generator=torch.Generator().manual_seed(bits))
    importance = (
        torch.rand(32, generator=torch.Generator().manual_seed(9)).square() + 0.01 if weighted else None
    )
    best = brute_force(fmt, w, importance).sum()
    plain = errors(fmt, w, measured(fmt, w), importance).sum()
    for effort in (THOROUGH, QUICK):
        found = errors(fmt, w, search_knobs(fmt, w, weighed(importance), effort), importance).sum()
        assert found <= plain
        missed = (found - best) / (plain - best)
        assert missed < (0.1 if sym else 0.4)  # measured: at most 0.05 and 0.32


@pytest.mark.parametrize("sym", [True, False])
def test_importance_decides_what_is_kept(sym):
    """An outlier that does not matter is given up for the others, and kept when it matters."""
    fmt = int_format(3, 16, sym=sym)
    w = 0.1 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    w[:, 5] = 3.0
    matters, does_not = torch.ones(16), torch.ones(16)
    matters[5], does_not[5] = 1e3, 0.0

    def outlier_error(importance):
        q = fmt.quantize(w, search_knobs(fmt, w, weighed(importance), THOROUGH))
        return (fmt.dequantize(q) - w)[:, 5].abs().mean()

    assert outlier_error(matters) < 0.2
    assert outlier_error(does_not) > 1.0
    others = [i for i in range(16) if i != 5]
    kept = fmt.dequantize(fmt.quantize(w, search_knobs(fmt, w, Importance(does_not), THOROUGH)))[:, others]
    lost = fmt.dequantize(fmt.quantize(w))[:, others]
    gain = (kept - w[:, others]).square().sum() / (lost - w[:, others]).square().sum()
    assert gain < (0.3 if sym else 0.6)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [-1, 0, 32])
def test_the_scale_of_the_importance_does_not_matter(sym, group):
    fmt = int_format(3, group, sym=sym)
    w = random_weight((4, 64), 1)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    one, *others = (search_knobs(fmt, w, Importance(f * importance), QUICK) for f in (1.0, 2.0**10, 2.0**-40))
    for other in others:
        assert torch.equal(one.lo, other.lo)
        assert torch.equal(one.hi, other.hi)


@pytest.mark.parametrize("bad", [torch.zeros(64), torch.full((64,), torch.nan), torch.full((64,), torch.inf)])
def test_importance_that_says_nothing_weighs_all_alike(bad):
    fmt = int_format(3, 32, sym=True)
    w = random_weight((4, 64), 1)
    assert torch.equal(search_knobs(fmt, w, Importance(bad), QUICK).lo, search_knobs(fmt, w, None, QUICK).lo)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [-1, 0, 32])
def test_experts_are_searched_one_by_one(sym, group):
    fmt = int_format(3, group, sym=sym)
    w = random_weight((2, 3, 4, 48), 3)
    importance = torch.rand(48, generator=torch.Generator().manual_seed(2)) + 0.1
    knobs = search_knobs(fmt, w, weighed(importance), QUICK)
    assert knobs.lo.shape == fmt.group.scale_shape(w.shape)
    for i, j in itertools.product(range(2), range(3)):
        alone = search_knobs(fmt, w[i, j], weighed(importance), QUICK)
        assert torch.equal(knobs.lo[i, j], alone.lo)
        assert torch.equal(knobs.hi[i, j], alone.hi)


def test_bands_of_rows_do_not_matter():
    fmt = int_format(4, 512, sym=True)
    w = random_weight((CHUNK // 512 + 3, 512), 4)
    knobs = search_knobs(fmt, w, None, QUICK)
    tail = search_knobs(fmt, w[-5:], None, QUICK)
    assert torch.equal(knobs.lo[-5:], tail.lo)
    assert torch.equal(knobs.hi[-5:], tail.hi)


@pytest.mark.parametrize("sym", [True, False])
def test_zeros_and_tiny_weights_are_left_alone(sym):
    fmt = int_format(4, 32, sym=sym)
    w = random_weight((4, 64), 5)
    w[0], w[1, :32], w[2] = 0, 0, w[2] * 1e-30
    knobs = search_knobs(fmt, w, Importance(torch.ones(64)), THOROUGH)
    for side in (knobs.lo, knobs.hi):
        assert torch.isfinite(side).all()
        assert ((side >= 0) & (side <= 16)).all()
    seen = fmt.dequantize(fmt.quantize(w, knobs))
    assert (seen[0] == 0).all()
    assert (seen[1, :32] == 0).all()
