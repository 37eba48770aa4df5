"""Divergence by bins."""

from __future__ import annotations

import pytest
import torch

from auto_round.evaluate.histogram import BINS_PER_DECADE, FIRST_POWER, N_BINS, Histogram


@pytest.mark.parametrize("bin_", [0, 1, 17, N_BINS - 1])
def test_a_position_is_counted_between_the_borders_of_its_bin(bin_):
    found = Histogram()
    middle = 10 ** (FIRST_POWER + (bin_ + 0.5) / BINS_PER_DECADE)
    found.add(torch.tensor([middle, middle * 1.1, middle / 1.1], dtype=torch.float64))
    assert found.counts[bin_] == 3
    assert sum(found.counts) == 3


def test_what_lies_beyond_is_counted_at_the_ends():
    found = Histogram()
    found.add(torch.tensor([-1e-9, 0.0, 1e-30, 1e9, float("inf"), float("nan")]))
    assert (found.counts[0], found.counts[-1]) == (3, 3)


def test_counts_add_up():
    values, one, parts = torch.rand(100, generator=torch.Generator().manual_seed(1)), Histogram(), Histogram()
    one.add(values)
    for part in values.split(7):
        parts.add(part)
    assert one.to_json() == parts.to_json()
