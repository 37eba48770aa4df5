"""Intervals: quantiles as PyTorch has them, errors as theory has them, neighbours kept together."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.evaluate.intervals import Resampling, block_numbers, interpolated


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0, 1))
def test_interpolated_is_torch_quantile(values, share):
    ordered = torch.tensor(values, dtype=torch.float64).sort().values
    assert interpolated(ordered, share) == pytest.approx(float(ordered.quantile(share)), abs=1e-12)


@given(st.integers(1, 60), st.integers(1, 700))
def test_blocks_are_neighbours_within_one_row(rows, positions):
    blocks = block_numbers(rows, positions)
    assert len(blocks) == rows * positions
    assert torch.equal(blocks.unique(), torch.arange(int(blocks.max()) + 1))
    assert (blocks.diff() >= 0).all()
    row_of = torch.arange(rows).repeat_interleave(positions)
    for block in blocks.unique()[:5]:
        assert len(row_of[blocks == block].unique()) == 1


def test_few_rows_are_cut_and_many_are_not():
    assert len(block_numbers(50, 511).unique()) == 50
    assert len(block_numbers(2, 511).unique()) >= 20
    assert len(block_numbers(2, 20).unique()) == 2


def test_error_of_independent_values_is_that_of_theory():
    values = torch.randn(4000, generator=generator(), dtype=torch.float64)
    draws = Resampling(block_numbers(100, 40), generator(1))
    found = draws.mean(values)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.error == pytest.approx(1 / math.sqrt(4000), rel=0.2)
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.error, rel=0.1)


def test_neighbours_that_are_alike_widen_the_interval():
    """100 rows of 40 equal values are 100 values, not 4000."""
    values = torch.randn(100, generator=generator(), dtype=torch.float64).repeat_interleave(40)
    assert Resampling(block_numbers(100, 40), generator(1)).mean(values).error == pytest.approx(0.1, rel=0.2)


def test_quantiles_are_drawn_as_repeated_values():
    """The interval of a quantile is that of the quantiles of texts put together from the drawn blocks."""
    values = torch.randn(300, generator=generator(2), dtype=torch.float64)
    blocks = block_numbers(30, 10)
    draws = Resampling(blocks, generator(3), times=200)
    found = draws.quantile(values, 0.9)
    index = torch.randint(30, (200, 30), generator=generator(3))
    texts = values.view(30, 10)[index].flatten(1)
    lower = texts.quantile(0.9, dim=1, interpolation="lower")
    higher = texts.quantile(0.9, dim=1, interpolation="higher")
    assert lower.quantile(0.025) - 1e-9 <= found.low <= higher.quantile(0.025) + 1e-9
    assert lower.quantile(0.975) - 1e-9 <= found.high <= higher.quantile(0.975) + 1e-9


def test_ratios_are_drawn_as_pairs():
    """The perplexity of both is uncertain, their ratio is not."""
    nll = torch.randn(600, generator=generator(), dtype=torch.float64)
    draws = Resampling(block_numbers(30, 20), generator(1))
    ratio = draws.of_means(lambda a, b: torch.exp(a - b), nll + 0.1, nll)
    assert ratio.value == pytest.approx(math.exp(0.1))
    assert ratio.error < 1e-12
    assert draws.of_means(torch.exp, nll).error > 0.01


def test_the_same_seed_gives_the_same_interval():
    values = torch.rand(200, generator=generator())
    blocks = block_numbers(20, 10)
    first, second = (Resampling(blocks, generator(7)).mean(values) for _ in range(2))
    assert first == second
