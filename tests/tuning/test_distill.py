"""Steps of tuning all blocks together: Adam, sums of gradients, rates, order of rows."""

from __future__ import annotations

import pytest
import torch

from auto_round.errors import ConfigError
from auto_round.tuning.distill import BETAS, DistillConfig, Rate, row_order, rows_of_step, take_step

MANY = DistillConfig(steps=100)


def test_steps_are_those_of_adam():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator)
    values, moments = {"a": start.clone()}, {}
    peer = torch.nn.Parameter(start.clone())
    config = DistillConfig(steps=4)
    optimizer = torch.optim.Adam([peer], betas=BETAS, eps=1e-15)
    for step in range(4):
        gradient = torch.randn(5, generator=generator)
        take_step(values, {"a": gradient}, moments, {"a": Rate(0.04)}, step=step, config=config)
        optimizer.param_groups[0]["lr"] = 0.04 * config.factor(step)
        peer.grad = gradient
        optimizer.step()
    assert torch.allclose(values["a"], peer.detach(), rtol=1e-5, atol=1e-7)


def test_offsets_lie_where_the_sum_of_their_gradients_puts_them():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(100, 500, generator=generator)
    gradients[:, 0] = 1e-9  # as small as they may be, but all alike
    values, moments = {"a": torch.full((500,), 3.0)}, {}
    for step, gradient in enumerate(gradients):
        take_step(values, {"a": gradient}, moments, {"a": Rate(0.04, summed=True)}, step=step, config=MANY)
    expected = 3.0 - 0.04 * gradients.sum(0) / gradients.square().sum(0).sqrt()
    assert torch.allclose(values["a"], expected, atol=1e-4)
    assert float(values["a"][0]) == pytest.approx(3.0 - 0.4, abs=1e-3)
    assert float((values["a"][1:] - 3.0).std()) == pytest.approx(0.04, rel=0.1)  # noise does not add up


def test_the_first_steps_move_offsets_less():
    values = {"a": torch.zeros(1)}
    take_step(values, {"a": torch.ones(1)}, {}, {"a": Rate(0.04, summed=True)}, step=0, config=MANY)
    assert float(values["a"]) == pytest.approx(-0.0004)


def test_a_relative_step_is_a_share_of_the_parameter():
    values = {"a": torch.tensor([0.0, 1.0, -2.0])}
    rates, size = {"a": Rate(0.01, relative=True)}, 0.01 * MANY.factor(0)
    take_step(values, {"a": torch.ones(3)}, {}, rates, step=0, config=MANY)
    assert values["a"].tolist() == pytest.approx([0.0, 1 - size, -2 + 2 * size])


def test_no_gradient_no_step():
    values, moments = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, {}
    rates = {"a": Rate(0.1), "b": Rate(0.1), "c": Rate(0.1, summed=True)}
    nothing = {"a": torch.zeros(2), "c": torch.zeros(2)}
    take_step(values, nothing, moments, rates, step=0, config=MANY)
    assert all(value.tolist() == [1.0, 1.0] for value in values.values())
    assert moments.keys() == {"mean.a", "square.a", "sum.c", "square.c"}


def test_rates_follow_the_bits_and_the_users_own():
    plain = DistillConfig(steps=300)
    for rate in (plain.range_rate, plain.norm_rate):
        assert [rate(bits) for bits in (2, 3, 4)] == pytest.approx([3e-3, 7.5e-4, 1.875e-4])
    own = DistillConfig(steps=300, lr=2 * plain.lr)
    assert own.range_rate(2) == own.norm_rate(2) == pytest.approx(6e-3)
    assert plain.factor(0) == pytest.approx(1 / 3)
    assert plain.factor(9) == pytest.approx(1.0, abs=0.01)
    assert plain.factor(299) < 1e-4
    assert [plain.rise(step) for step in (-1, 0, 149, 299)] == pytest.approx([0.0, 1 / 300, 0.5, 1.0])
    assert max(plain.looks) == 300
    assert len(plain.looks) == 10
    assert DistillConfig(steps=8).looks == {2, 4, 6, 8}
    assert DistillConfig(steps=3).looks == {2, 3}


def test_every_row_is_seen_before_one_is_seen_again():
    order = row_order(10, 4, 5, seed=1)
    assert all(len(set(step)) == 4 for step in order)
    assert len({i for step in order[:2] for i in step}) == 8
    assert order == row_order(10, 4, 5, seed=1) != row_order(10, 4, 5, seed=2)
    assert row_order(3, 8, 2, seed=1) == [[0, 1, 2], [0, 1, 2]]
    assert [rows_of_step(length) for length in (256, 1024, 2048, 5000)] == [4, 1, 1, 1]


@pytest.mark.parametrize("given", [{"steps": 0}, {"steps": 1, "lr": 0.0}, {"steps": 1, "lr": 1.0}])
def test_settings_that_cannot_be(given):
    with pytest.raises(ConfigError):
        DistillConfig(**given)
