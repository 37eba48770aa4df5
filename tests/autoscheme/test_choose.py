"""The choice is the best there is, and within its limit."""

from __future__ import annotations

import itertools
import random

import pytest

from auto_round.autoscheme.choose import least_cost, least_loss
from auto_round.errors import ConfigError


def tables(rng: random.Random) -> tuple[list[list[float]], list[list[float]]]:
    groups, options = rng.randint(1, 6), rng.randint(1, 4)
    sizes = [rng.choice([1, 1, 2, 3]) * rng.randint(1, 5000) for _ in range(groups)]
    bits = sorted(rng.uniform(1, 16) for _ in range(options))
    scale = 10.0 ** rng.randint(-9, 3)
    costs = [[size * b for b in bits] for size in sizes]
    losses = [[scale * rng.random() * 4.0**-b for b in bits] for _ in sizes]
    return costs, losses


def by_hand(first: list[list[float]], second: list[list[float]], limit: float) -> float:
    """Least sum of `first` among all picks whose sum of `second` is within the limit."""
    picks = itertools.product(*(range(len(row)) for row in first))
    fitting = [p for p in picks if sum(r[i] for r, i in zip(second, p, strict=True)) <= limit]
    return min(sum(r[i] for r, i in zip(first, p, strict=True)) for p in fitting)


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_it_equals_trying_everything(start: int) -> None:
    for seed in range(start, start + 50):
        rng = random.Random(seed)
        costs, losses = tables(rng)
        least, most = sum(map(min, costs)), sum(map(max, costs))
        budget = least + (most - least) * rng.random()
        found = least_loss(costs, losses, budget)
        assert found.cost <= budget
        assert found.gap == 0
        assert found.loss == pytest.approx(by_hand(losses, costs, budget), rel=1e-9)
        assert found.cost == pytest.approx(sum(r[i] for r, i in zip(costs, found.picks, strict=True)))
        wanted = sum(map(min, losses)) + (sum(map(max, losses)) - sum(map(min, losses))) * rng.random()
        cheap = least_cost(costs, losses, wanted)
        assert cheap.loss <= wanted
        assert cheap.cost == pytest.approx(by_hand(costs, losses, wanted), rel=1e-9)


def test_budgets_at_the_ends() -> None:
    costs, losses = [[2.0, 4.0], [3.0, 9.0]], [[1.0, 0.1], [2.0, 0.5]]
    assert least_loss(costs, losses, 5.0).picks == (0, 0)
    assert least_loss(costs, losses, 1e9).picks == (1, 1)
    assert least_loss(costs, losses, 13.0).picks == (1, 1)
    with pytest.raises(ConfigError, match="least that can be reached, 5"):
        least_loss(costs, losses, 4.9)
    with pytest.raises(ConfigError, match=r"least that can be reached, 0\.6"):
        least_cost(costs, losses, 0.5)


def test_a_large_case_is_within_two_hundredths_of_a_bit() -> None:
    rng = random.Random(1)
    sizes = [rng.choice([1 << 20, 3 << 20, 1 << 18]) for _ in range(320)]
    bits = [2.25, 3.25, 4.125, 8.125]
    costs = [[size * b for b in bits] for size in sizes]
    losses = [[rng.lognormvariate(0, 1) * size * 4.0**-b for b in bits] for size in sizes]
    for target in (2.5, 3.0, 4.0, 6.0):
        found = least_loss(costs, losses, target * sum(sizes))
        assert target - 0.02 < found.cost / sum(sizes) <= target
        assert found.gap <= 1e-4
