from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.numerics.token_weights import CAP, massive_tokens, token_energy, token_weights


def row(values):
    return torch.tensor([values], dtype=torch.float32)


def test_by_hand():
    energy = row([1.0, 2.0, 3.0, 12.0, 24.0])  # median 3
    assert token_weights(energy).tolist() == [[1, 1, 1, 1, 0.5]]
    mask = torch.tensor([[True, True, False, False, True]])  # median of 1, 2, 24 is 2
    assert token_weights(energy, mask).tolist() == [[1, 1, 0, 0, pytest.approx(1 / 3)]]


def test_energy_is_the_mean_square_in_float32():
    x = torch.full((2, 3, 4), 300.0, dtype=torch.float16)
    assert token_energy(x).tolist() == [[90000.0] * 3] * 2
    assert token_energy(x).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(min_value=2.0**-40, max_value=2.0**40, width=32), min_size=1, max_size=40),
    st.integers(min_value=-30, max_value=30),
    st.randoms(use_true_random=False),
)
def test_a_token_counts_at_most_as_much_as_cap_medians(values, exponent, random):
    energy = row(values)
    weights = token_weights(energy)
    median = sorted(values)[(len(values) - 1) // 2]
    assert bool(((weights > 0) & (weights <= 1)).all())
    assert bool((weights * energy <= CAP * median * (1 + 1e-6)).all())
    assert bool((weights[energy <= CAP * median] == 1).all())
    # The unit of the activations, the order of tokens and other rows change nothing.
    assert torch.equal(token_weights(energy * 2.0**exponent), weights)
    order = list(range(len(values)))
    random.shuffle(order)
    assert torch.equal(token_weights(energy[:, order]), weights[:, order])
    assert torch.equal(
        token_weights(torch.cat([energy, energy.flip(-1) * 7, energy]))[::2], weights.expand(2, -1)
    )


def test_padding_has_no_influence_whatever_stands_there():
    energy, mask = row([1.0, 2.0, 3.0, 100.0, 0.0]), torch.tensor([[True, True, True, True, False]])
    expected = token_weights(energy[:, :4])
    for dirt in (0.0, 1e30, torch.inf, torch.nan):
        energy[0, 4] = dirt
        assert torch.equal(token_weights(energy, mask)[:, :4], expected)
        assert token_weights(energy, mask)[0, 4] == 0
        assert massive_tokens(energy, mask) == massive_tokens(energy[:, :4])


def test_rows_of_zeros_and_rows_without_tokens():
    assert token_weights(row([0.0, 0.0, 0.0, 5.0])).tolist() == [[1, 1, 1, 1]]
    assert token_weights(row([1.0, 2.0]), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0, 0]]
    assert token_weights(torch.zeros(3, 0)).shape == (3, 0)


def test_what_is_not_finite_stays_visible():
    """A loss with such a token must not become finite: a run has to stop there."""
    energy = row([1.0, 1.0, torch.nan])
    assert token_weights(energy)[0, 2] == 1
    assert not (token_weights(row([1.0, 1.0, torch.inf])) * row([1.0, 1.0, torch.inf])).isfinite().all()


def test_massive_tokens_and_their_share():
    energy = torch.ones(2, 50)
    assert massive_tokens(energy) == (0.0, 0.0)
    energy[:, 0] = 99.0
    assert massive_tokens(energy) == (0.0, 0.0)
    energy[:, 0] = 951.0
    found = massive_tokens(energy)
    assert found.tokens == pytest.approx(0.02)
    assert found.energy == pytest.approx(0.951)
