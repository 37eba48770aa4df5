"""Whole-number formats against the formulas written out with Python's own numbers, weight by weight."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.numerics.grid import IntGrid
from auto_round.numerics.presets import int_format


def to_half(x: Fraction) -> Fraction:
    """Nearest binary16 number of a value in its normal range, ties to even, in whole-number arithmetic."""
    if x == 0:
        return x
    magnitude, exponent = abs(x), 0
    while magnitude >= 2:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 1:
        magnitude, exponent = magnitude * 2, exponent - 1
    rounded = Fraction(round(magnitude * 1024), 1024) * Fraction(2) ** exponent
    return rounded if x > 0 else -rounded


def symmetric(group: list[Fraction], bits: int) -> tuple[list[int], Fraction]:
    """Codes and step: the larger extreme, the positive one if equal, goes to the lowest number."""
    top = 1 << (bits - 1)
    low, high = -min(0, *group), max(0, *group)
    step = to_half((low if high < low else -high) / top)
    return [min(max(round(w / step), -top), top - 1) + top for w in group], step


def asymmetric(group: list[Fraction], bits: int) -> tuple[list[int], Fraction, int]:
    """Codes, step and zero point: the range, zero included, is spread over all codes."""
    top = (1 << bits) - 1
    low, high = -min(0, *group), max(0, *group)
    step = to_half((high + low) / top)
    zero = round(low / step)
    return [min(max(round(w / step) + zero, 0), top) for w in group], step, zero


# Weights of at most 9 bits: their quotients are exact ties, or so far from one that float32 can tell.
weights = st.lists(st.integers(-256, 256), min_size=8, max_size=8).filter(any)


@given(values=weights, bits=st.integers(2, 8), scale=st.integers(-6, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_symmetric(values, bits, scale):
    group = [Fraction(x) * Fraction(2) ** scale for x in values]
    codes, step = symmetric(group, bits)
    q = int_format(bits, 8, sym=True).quantize(torch.tensor([[float(x) for x in group]]))
    assert q.scale.step.item() == float(step)
    assert q.codes[0].tolist() == codes
    seen = q.format.dequantize(q, torch.float64)[0].tolist()
    assert seen == [float(torch.tensor(float((c - (1 << bits - 1)) * step)).float()) for c in codes]


@given(values=weights, bits=st.integers(2, 8), scale=st.integers(-6, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_asymmetric(values, bits, scale):
    group = [Fraction(x) * Fraction(2) ** scale for x in values]
    codes, step, zero = asymmetric(group, bits)
    q = int_format(bits, 8, sym=False).quantize(torch.tensor([[float(x) for x in group]]))
    assert (q.scale.step.item(), q.scale.zero.item()) == (float(step), zero)
    assert q.codes[0].tolist() == codes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_every_bfloat16_number_through_every_grid(bits, sym):
    grid = IntGrid(bits, -(1 << bits - 1) if sym else 0)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = every[torch.isfinite(every)]
    want = [min(max(round(u), grid.lo), grid.hi) - grid.lo for u in every.tolist()]
    assert grid.encode(grid.snap(every)).tolist() == want


@pytest.mark.parametrize("sym", [True, False])
def test_ties_of_whole_weights(sym):
    """A step of exactly 1: weights at halves go to even numbers, the zero point (7, odd) notwithstanding."""
    halves = [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]
    ends = [-8.0, 7.0] if sym else [-7.0, 8.0]
    fmt = int_format(4, -1, sym=sym)
    q = fmt.quantize(torch.tensor([ends + halves]))
    assert q.scale.step.item() == 1
    assert fmt.dequantize(q)[0].tolist() == [*ends, -4, -2, -2, 0, 0, 2, 2, 4]
