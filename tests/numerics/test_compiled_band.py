"""The compiled errors of groups: those of `Band`, for every kind of scale, shape and number of threads."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round import compiled
from auto_round.errors import Refusal
from auto_round.numerics import compiled_band
from auto_round.numerics.band import Band, by_place
from auto_round.numerics.compiled_band import LANES, CompiledBand, squares_band
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.importance import Importance
from auto_round.numerics.presets import GGUF_FORMATS, int_format
from auto_round.numerics.scale import Scale
from auto_round.numerics.search import BY_SQUARES, QUICK, THOROUGH, search_knobs
from auto_round.testing.format_kit import random_weight

PROGRAM = compiled_band._program()
needs_program = pytest.mark.skipif(PROGRAM is None, reason="no C compiler")

SCALES = ("step", "step and zero point", "step and floor")


def case(rows, n_groups, width, scales, seed, weighted=True):
    """Weights, importance, and scales under which some weights saturate."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    w = torch.randn(rows, n_groups, width, generator=generator)
    step = (0.05 + draw(rows, n_groups)) * (1 if "and" in scales else torch.sign(draw(rows, n_groups) - 0.5))
    zero = (draw(rows, n_groups) * 15).round() if "zero" in scales else None
    floor = draw(rows, n_groups) * 2 if "floor" in scales else None
    importance = draw(1, n_groups, width) + 0.01 if weighted else None
    return w, importance, Scale(step, zero, floor=floor), IntGrid(4, -8 if scales == "step" else 0)


def reference(w, importance, along=0.0):
    return Band(by_place(w), None if importance is None else by_place(importance.expand_as(w)), along)


def assert_same(got, want, w):
    """Equal but for the order of additions and fused products."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(w.shape[-1]))


@needs_program
@given(
    rows=st.integers(1, 9),
    n_groups=st.integers(1, 2 * LANES + 3),
    width=st.sampled_from([1, 7, 16, 32, 33, 128, 129, 300]),
    scales=st.sampled_from(SCALES),
    weighted=st.booleans(),
    along=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_errors_and_sums_are_those_of_the_reference(rows, n_groups, width, scales, weighted, along, seed):
    w, importance, scale, grid = case(rows, n_groups, width, scales, seed, weighted)
    own, band = CompiledBand(PROGRAM, w, importance, along), reference(w, importance, along)
    assert_same(own.error(grid, scale), band.error(grid, scale), w)
    mine, theirs = own.moments(grid, scale), band.moments(grid, scale)
    for name in ("one", "n", "w", "nn", "nw"):
        assert_same(getattr(mine, name), getattr(theirs, name), w)


@needs_program
@pytest.mark.parametrize("scales", SCALES)
def test_ties_go_to_the_even_number_and_zero_points_come_after(scales):
    """Halves of a step: another rounding changes errors of 0 into others, or sums of numbers."""
    w = (torch.arange(-40, 40) / 2).reshape(1, 5, 16)
    zero = torch.full((1, 5), 3.0) if "zero" in scales else None
    floor = torch.full((1, 5), 1.5) if "floor" in scales else None
    scale, grid = Scale(torch.ones(1, 5), zero, floor=floor), IntGrid(5, -16)
    mine, theirs = (
        band.moments(grid, scale) for band in (CompiledBand(PROGRAM, w, None), reference(w, None))
    )
    for name in ("n", "nn", "nw"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))


def test_errors_along_the_weights_count_in_addition():
    """A group that comes back at nine tenths of its size: its error is all along it."""
    w = torch.tensor([3.0, -2.0, 1.0, 2.0]).reshape(1, 1, 4)
    for importance in (None, torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 4)):
        weigh = torch.ones(4) if importance is None else importance.flatten()
        shrunk = Scale(torch.full((1, 1), 0.9), None)
        size = float((weigh * w.flatten().square()).sum())
        for along in (0.0, 1.0, 4.0):
            found = reference(w, importance, along).error(IntGrid(4, -8), shrunk)
            assert found.item() == pytest.approx((1 + along) * 0.01 * size, rel=1e-5)


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_0", "q6_k"])
def test_a_search_by_squares_shrinks_less_when_that_counts(name):
    fmt = GGUF_FORMATS[name]
    generator = torch.Generator().manual_seed(8)
    w, squares = torch.randn(64, 512, generator=generator), torch.rand(512, generator=generator) + 0.1
    gain = []
    for effort in (THOROUGH, BY_SQUARES):
        back = fmt.dequantize(fmt.quantize(w, search_knobs(fmt, w, Importance(squares), effort)))
        gain.append(float((back * w * squares).sum() / (w.square() * squares).sum()))
    assert gain[0] < gain[1] < 1.001
    assert 1 - gain[1] < 0.9 * (1 - gain[0])


@needs_program
def test_results_do_not_depend_on_threads_or_neighbours():
    w, importance, scale, grid = case(37, 9, 32, "step and floor", 3)
    own = CompiledBand(PROGRAM, w, importance).error(grid, scale)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(CompiledBand(PROGRAM, w, importance).error(grid, scale), own)
    finally:
        torch.set_num_threads(threads)
    tail = Scale(scale.step[5:8], None, floor=scale.floor[5:8])
    assert torch.equal(CompiledBand(PROGRAM, w[5:8], importance).error(grid, tail), own[5:8])


@needs_program
@pytest.mark.parametrize("fmt", [GGUF_FORMATS["q4_k"], GGUF_FORMATS["q6_k"], int_format(3, 64, sym=False)])
@pytest.mark.parametrize("effort", [QUICK, THOROUGH], ids=["quick", "thorough"])
def test_a_search_without_the_program_finds_the_same(monkeypatch, fmt, effort):
    w, squares = (
        random_weight((24, 512), 5),
        torch.rand(512, generator=torch.Generator().manual_seed(5)) + 0.1,
    )
    found = search_knobs(fmt, w, Importance(squares), effort)
    monkeypatch.setattr(compiled_band, "_program", lambda: None)
    plain = search_knobs(fmt, w, Importance(squares), effort)
    total = [
        ((fmt.dequantize(fmt.quantize(w, knobs)) - w).double().square() * squares).sum()
        for knobs in (found, plain)
    ]
    assert abs(total[0] / total[1] - 1) < 1e-3


def test_without_a_compiler_the_search_says_so_and_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "library", lambda file, options: Refusal(file.name, "no C compiler"))
    compiled.numeric_library.cache_clear()
    try:
        with caplog.at_level("INFO", logger="auto_round"):
            band = squares_band(IntGrid(4, -8), torch.ones(2, 2, 16), None)
        assert isinstance(band, Band)
        assert "no C compiler" in caplog.text
    finally:
        compiled.numeric_library.cache_clear()


def test_other_grids_are_not_given_to_the_program(monkeypatch):
    class Odd:
        bits, lo, hi = 2, -1.0, 1.0

    monkeypatch.setattr(compiled_band, "_program", lambda: ctypes.CDLL(None))
    assert isinstance(squares_band(Odd(), torch.ones(1, 1, 16), None), Band)


def test_every_instruction_set_has_a_library_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(compiled, "library", lambda file, options: asked.append(options))
    for name in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=name: name)
        compiled.numeric_library.__wrapped__(compiled_band.SOURCE, (), "")
    assert len(set(asked)) == 3
    assert not any("native" in option for options in asked for option in options)
