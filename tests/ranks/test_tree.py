"""Sums by places: the same bits for any division of the places, and plain arithmetic for few."""

from __future__ import annotations

import random

import pytest
import torch

from auto_round.ranks.ranks import part_of
from auto_round.ranks.tree import TreeSum, fold


def values(count, *, holes=False):
    generator, chance = torch.Generator().manual_seed(count), random.Random(count)
    rows = torch.randn(count, 3, 50, generator=generator) * 10.0 ** torch.arange(-3, 0)[:, None]
    return [[None if holes and chance.random() < 0.4 else x.clone() for x in row] for row in rows]


def summed(rows, ranges):
    nodes = {}
    for places in ranges:
        own = TreeSum()
        for place in places:
            own.add(place, [None if x is None else x.clone() for x in rows[place]])
        nodes |= own.nodes()
    return fold(nodes), len(nodes)


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_four_values_are_added_in_pairs():
    a, b, c, d = (torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8]), torch.tensor([1.0]))
    (total,), _ = summed([[a], [b], [c], [d]], [range(4)])
    assert total.tolist() == [(a + b + (c + d)).item()]
    assert total.tolist() != [(((a + b) + c) + d).item()]


def test_values_of_one_place_are_added_as_they_come():
    own = TreeSum()
    for number in (1e8, 1.0, -1e8, 1.0):
        own.add(0, [torch.tensor([number])])
    assert fold(own.nodes())[0].tolist() == [1.0]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
def test_a_sum_is_the_same_bits_for_any_number_of_ranks(count, holes):
    rows = values(count, holes=holes)
    alone, _ = summed(rows, [range(count)])
    for size in range(2, count + 3):
        parts = [part_of(rank, size, range(count)) for rank in range(size)]
        assert [place for part in parts for place in part] == list(range(count))
        assert same(summed(rows, parts)[0], alone)


def test_a_rank_hands_on_one_value_for_a_whole_subtree():
    rows = values(16)
    assert summed(rows, [range(16)])[1] == 1
    assert summed(rows, [part_of(rank, 4, range(16)) for rank in range(4)])[1] == 4
    assert summed(rows, [range(3), range(3, 16)])[1] <= 6


def test_16_bits_are_added_in_float32_and_64_stay():
    half = [[torch.tensor([2048.0], dtype=torch.float16)], [torch.tensor([1.0], dtype=torch.float16)]]
    assert summed(half, [range(2)])[0][0].tolist() == [2049.0]
    fine = [[torch.tensor([2.0**53], dtype=torch.float64)], [torch.tensor([2.0], dtype=torch.float64)]]
    assert summed(fine, [range(2)])[0][0].tolist() == [2.0**53 + 2]


def test_nothing_added_is_nothing():
    assert fold(TreeSum().nodes()) == []
