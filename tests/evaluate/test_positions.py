"""Figures of positions against the formulas in float64."""

from __future__ import annotations

import pytest
import torch

from auto_round.evaluate import positions
from auto_round.evaluate.positions import MEANINGS, compare_positions, likelihoods


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    first = 3 * torch.randn(50, 40, generator=generator)
    second = first + 0.5 * torch.randn(50, 40, generator=generator)
    return first, second, torch.randint(40, (50,), generator=generator)


def test_every_figure_is_what_its_meaning_says(pair):
    first, second, following = pair
    p, q = first.double().softmax(-1), second.double().softmax(-1)
    each = torch.arange(50)
    found = compare_positions(first, second, following)
    wanted = {
        "nll_original": -p[each, following].log(),
        "nll": -q[each, following].log(),
        "kl": (p * (p / q).log()).sum(-1),
        "kl_reverse": (q * (q / p).log()).sum(-1),
        "difference": q[each, following] - p[each, following],
        "confidence": p.max(-1).values,
        "same_top": (p.argmax(-1) == q.argmax(-1)).double(),
    }
    for k in (5, 10):
        sets = [set(m.argsort(descending=True)[:k].tolist()) for m in (*p, *q)]
        wanted[f"top_{k}"] = torch.tensor([len(sets[i] & sets[50 + i]) / k for i in range(50)]).double()
    assert found.keys() == wanted.keys() == MEANINGS.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(likelihoods(second, following)["nll"], found["nll"])


def test_pieces_give_the_same(pair, monkeypatch):
    whole = compare_positions(*pair)
    monkeypatch.setattr(positions, "positions_at_once", lambda vocabulary: 7)
    pieces = compare_positions(*pair)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_a_model_is_at_no_distance_from_itself(pair):
    first, _, following = pair
    found = compare_positions(first, first, following)
    assert not found["kl"].any()
    assert not found["difference"].any()
    assert found["top_10"].eq(1).all()


def test_vocabularies_smaller_than_the_sets_of_likeliest_tokens():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    assert compare_positions(logits, -logits, torch.tensor([0]))["top_5"].item() == 1
