"""Compiled errors of weights whose inputs are related: those of `CorrelatedBand`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.numerics import compiled_correlated
from auto_round.numerics.band import CorrelatedBand
from auto_round.numerics.compiled_correlated import CompiledCorrelated, correlated_band
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.presets import GGUF_FORMATS, int_format
from auto_round.numerics.presets_float import nv_format
from auto_round.numerics.scale import Scale
from auto_round.numerics.search import QUICK, THOROUGH, search_knobs
from auto_round.testing.format_kit import random_weight
from numerics.test_importance import importance_of, inputs, output_error

PROGRAM = compiled_correlated._program()
needs_program = pytest.mark.skipif(PROGRAM is None, reason="no C compiler")

SCALES = ("step", "step and zero point", "step and floor")


def case(rows, n_groups, width, piece, scales, seed):
    """Weights, products of related inputs, and scales under which some weights saturate."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    w, pieces = torch.randn(rows, n_groups, width, generator=generator), n_groups * -(-width // piece)
    x = torch.randn(pieces, 40, piece, generator=generator) + draw(pieces, 40, 1)
    products = x.transpose(1, 2) @ x / 40
    step = (0.05 + draw(rows, n_groups)) * (1 if "and" in scales else torch.sign(draw(rows, n_groups) - 0.5))
    zero = (draw(rows, n_groups) * 15).round() if "zero" in scales else None
    floor = draw(rows, n_groups) * 2 if "floor" in scales else None
    return w, products, Scale(step, zero, floor=floor), IntGrid(4, -8 if scales == "step" else 0)


@needs_program
@given(
    rows=st.integers(1, 70),
    n_groups=st.integers(1, 4),
    widths=st.sampled_from([(8, 8), (32, 32), (64, 64), (128, 128), (256, 128), (300, 128)]),
    scales=st.sampled_from(SCALES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_errors_and_sums_are_those_of_the_reference(rows, n_groups, widths, scales, seed):
    width, piece = widths
    w, products, scale, grid = case(rows, 1 if width % piece else n_groups, width, piece, scales, seed)
    own, band = CompiledCorrelated(PROGRAM, w, products), CorrelatedBand(w, products)
    torch.testing.assert_close(own.error(grid, scale), band.error(grid, scale), rtol=1e-4, atol=1e-4)
    mine, theirs = own.moments(grid, scale), band.moments(grid, scale)
    for name in ("one", "n", "w", "nn", "nw"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-4, atol=1e-4 * width)


@needs_program
def test_results_do_not_depend_on_threads_or_neighbours():
    w, products, scale, grid = case(77, 3, 64, 64, "step and floor", 3)
    own, threads = CompiledCorrelated(PROGRAM, w, products).error(grid, scale), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(CompiledCorrelated(PROGRAM, w, products).error(grid, scale), own)
    finally:
        torch.set_num_threads(threads)
    tail = Scale(scale.step[33:40], None, floor=scale.floor[33:40])
    assert torch.equal(CompiledCorrelated(PROGRAM, w[33:40], products).error(grid, tail), own[33:40])


@needs_program
@pytest.mark.parametrize(
    "fmt", [int_format(2, 64, sym=True), int_format(4, 128, sym=False), GGUF_FORMATS["q4_k"]]
)
@pytest.mark.parametrize("effort", [QUICK, THOROUGH], ids=["quick", "thorough"])
def test_a_search_without_the_program_finds_as_much(monkeypatch, fmt, effort):
    """Ranges of nearly the same error may change places, so errors are compared and not ranges."""
    w, x = random_weight((48, 512), 5), inputs(512)
    found = []
    for without in (False, True):
        if without:
            monkeypatch.setattr(compiled_correlated, "_program", lambda: None)
        bound = fmt.bind(fmt.stats(w))
        found.append(float(output_error(bound, w, search_knobs(bound, w, importance_of(x), effort), x).sum()))
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def test_what_the_program_does_not_know_is_left_to_pytorch():
    w, products, _, grid = case(4, 2, 64, 64, "step", 0)
    assert PROGRAM is None or isinstance(correlated_band(grid, w, products), CompiledCorrelated)
    narrow = case(4, 2, 4, 4, "step", 0)
    assert isinstance(correlated_band(grid, *narrow[:2]), CorrelatedBand)
    assert isinstance(correlated_band(nv_format().grid, w, products), CorrelatedBand)
