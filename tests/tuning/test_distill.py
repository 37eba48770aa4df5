"""Steps of tuning all blocks together: Adam, rates, order of rows."""

from __future__ import annotations

import pytest
import torch

from auto_round.config.tuning import TuneOptions
from auto_round.errors import ConfigError
from auto_round.tuning.distill import BETAS, DistillConfig, Rate, row_order, rows_of_step, take_step
from auto_round.tuning.weights import MARGIN

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


@pytest.mark.parametrize("steps", [40, 200, 400])
def test_noise_leaves_offsets_in_their_codes_and_what_gradients_agree_on_moves_them(steps):
    config = DistillConfig(steps=steps)
    generator = torch.Generator().manual_seed(0)
    values, moments, rates = {"a": torch.zeros(1000)}, {}, {"a": Rate(config.offset_rate)}
    for step in range(steps):
        gradient = torch.randn(1000, generator=generator)
        gradient[:10] = 1e-9  # as small as they may be, but all alike
        take_step(values, {"a": gradient}, moments, rates, step=step, config=config)
    assert float(values["a"][10:].std()) < 0.75 * MARGIN
    travel = config.offset_rate * sum(config.factor(step) for step in range(steps))
    assert values["a"][:10].tolist() == pytest.approx([-travel] * 10, rel=0.01)
    assert travel > MARGIN


def test_a_relative_step_is_a_share_of_the_parameter():
    values = {"a": torch.tensor([0.0, 1.0, -2.0])}
    rates, size = {"a": Rate(0.01, relative=True)}, 0.01 * MANY.factor(0)
    take_step(values, {"a": torch.ones(3)}, {}, rates, step=0, config=MANY)
    assert values["a"].tolist() == pytest.approx([0.0, 1 - size, -2 + 2 * size])


def test_no_gradient_no_step():
    values, moments = {"a": torch.ones(2), "b": torch.ones(2)}, {}
    rates = {"a": Rate(0.1), "b": Rate(0.1)}
    take_step(values, {"a": torch.zeros(2)}, moments, rates, step=0, config=MANY)
    assert all(value.tolist() == [1.0, 1.0] for value in values.values())
    assert moments.keys() == {"mean.a", "square.a", "usual.a"}


def test_a_gradient_far_longer_than_those_before_is_shortened():
    values, moments, rates = {"a": torch.zeros(4)}, {}, {"a": Rate(0.01)}
    lengths = [0.0, 1.0, 0.0, 1.5, 100.0, 1.0]
    usual = []
    for step, length in enumerate(lengths):
        gradient = torch.tensor([length, 0.0, 0.0, 0.0])
        take_step(values, {"a": gradient}, moments, rates, step=step, config=MANY)
        usual.append(float(moments["usual.a"]))
    # The first that is not 0 is what is usual, nothing changes where there is none, the fifth counts 2.1.
    assert usual == pytest.approx([0, 1, 1, 1.05, 1.155, 1.1395])
    assert float(moments["square.a"].max()) < 0.1


def test_steps_do_not_depend_on_the_unit_of_the_loss():
    def after(unit):
        generator = torch.Generator().manual_seed(0)
        values, moments = {"a": torch.zeros(5)}, {}
        for step in range(5):
            gradient = torch.randn(5, generator=generator) * unit * (50 if step == 3 else 1)
            take_step(values, {"a": gradient}, moments, {"a": Rate(0.04)}, step=step, config=MANY)
        return values["a"]

    assert torch.allclose(after(1.0), after(1e-6), rtol=1e-4)


def test_rates_follow_the_bits_and_the_users_own():
    plain = DistillConfig(steps=300)
    for rate, at_two in ((plain.range_rate, 6e-3), (plain.norm_rate, 3e-3)):
        assert [rate(bits) for bits in (2, 3, 4)] == pytest.approx([at_two, at_two / 4, at_two / 16])
    own = DistillConfig(steps=300, lr=2 * plain.offset_rate)
    assert own.range_rate(2) == 2 * own.norm_rate(2) == pytest.approx(12e-3)
    rates = [DistillConfig(steps=n).offset_rate for n in (50, 200, 800)]
    assert rates == pytest.approx([0.006, 0.006, 0.003], rel=0.01)
    assert plain.factor(0) == pytest.approx(1 / 20)
    assert plain.factor(19) == pytest.approx(1.0, abs=0.02)
    assert DistillConfig(steps=8).factor(0) == 1.0
    assert plain.factor(299) < 1e-4
    assert plain.looks == {75, 150, 225, 270, 300}
    assert DistillConfig(steps=8).looks == {2, 4, 6, 8}
    assert DistillConfig(steps=3).looks == {3}
    assert DistillConfig(steps=1).looks == {1}


def test_every_row_is_seen_before_one_is_seen_again():
    order = row_order(10, 4, 5, seed=1)
    assert all(len(set(step)) == 4 for step in order)
    assert len({i for step in order[:2] for i in step}) == 8
    assert order == row_order(10, 4, 5, seed=1) != row_order(10, 4, 5, seed=2)
    assert row_order(3, 8, 2, seed=1) == [[0, 1, 2], [0, 1, 2]]
    assert [rows_of_step(length) for length in (256, 1024, 2048, 5000)] == [4, 1, 1, 1]


@pytest.mark.parametrize("given", [{"distill_steps": -1}, {"distill_lr": 0.0}, {"distill_lr": 1.0}])
def test_settings_that_cannot_be(given):
    (name,) = given
    with pytest.raises(ConfigError, match=name):
        TuneOptions(**given)
