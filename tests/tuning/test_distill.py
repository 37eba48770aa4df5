"""Steps of tuning all blocks together: Adam, rates, order of rows."""

from __future__ import annotations

import pytest
import torch

from auto_round.errors import ConfigError
from auto_round.tuning.distill import BETAS, DistillConfig, Rate, adam_step, row_order, rows_of_step


def test_steps_are_those_of_adam():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator)
    values, moments = {"a": start.clone()}, {}
    peer = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([peer], lr=0.02, betas=BETAS, eps=1e-15)
    for step in range(4):
        gradient = torch.randn(5, generator=generator)
        adam_step(values, {"a": gradient}, moments, {"a": Rate(0.04)}, step=step, factor=0.5)
        peer.grad = gradient
        optimizer.step()
    assert torch.allclose(values["a"], peer.detach(), rtol=1e-5, atol=1e-7)


def test_a_relative_step_is_a_share_of_the_parameter():
    values = {"a": torch.tensor([0.0, 1.0, -2.0])}
    adam_step(values, {"a": torch.ones(3)}, {}, {"a": Rate(0.01, relative=True)}, step=0, factor=1.0)
    assert values["a"].tolist() == pytest.approx([0.0, 0.99, -1.98])


def test_no_gradient_no_step():
    values, moments = {"a": torch.ones(2), "b": torch.ones(2)}, {}
    rates = dict.fromkeys("ab", Rate(0.1))
    adam_step(values, {"a": torch.zeros(2)}, moments, rates, step=0, factor=1.0)
    assert values["a"].tolist() == values["b"].tolist() == [1.0, 1.0]
    assert moments.keys() == {"mean.a", "square.a"}


def test_rates_follow_the_bits_and_the_users_own():
    plain = DistillConfig(steps=300)
    assert [plain.offset_rate(bits) for bits in (2, 3, 4)] == [2e-3, 1e-3, 5e-4]
    assert [plain.range_rate(bits) for bits in (2, 3, 4)] == pytest.approx([5e-4, 1.25e-4, 3.125e-5])
    own = DistillConfig(steps=300, lr=4e-3)
    assert own.offset_rate(4) == 4e-3
    assert own.range_rate(2) == pytest.approx(1e-3)
    assert plain.factor(0) == pytest.approx(0.1)
    assert plain.factor(9) == pytest.approx(1.0, abs=0.01)
    assert plain.factor(299) < 1e-4
    assert max(plain.looks) == 300
    assert len(plain.looks) == 10
    assert DistillConfig(steps=3).looks == {1, 2, 3}


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
