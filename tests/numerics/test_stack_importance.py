"""Matrices of a stack that see inputs of their own: each is searched by its own importance."""

from __future__ import annotations

import pytest
import torch

from auto_round.numerics.descent import cancelling_offsets
from auto_round.numerics.importance import TILE, Importance, StackImportance
from auto_round.numerics.presets import int_format
from auto_round.numerics.search import QUICK, THOROUGH, search_knobs
from auto_round.tuning.weights import round_to_nearest

FMT = int_format(2, 32, sym=True)
EXPERTS, ROWS, WIDTH = 3, 8, 2 * TILE


def weights():
    return torch.randn(EXPERTS, ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def inputs(seed):
    """Channels of very different size, and with something in common."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, WIDTH, generator=generator)
    return (x + x[:, :1]) * (3 * torch.rand(WIDTH, generator=generator)).exp()


def importance_of(x):
    tiles = x.reshape(len(x), -1, TILE).permute(1, 0, 2)
    products = tiles.transpose(1, 2) @ tiles / len(x)
    return Importance(x.square().mean(0), products)


@pytest.mark.parametrize("effort", [QUICK, THOROUGH], ids=["quick", "thorough"])
def test_each_matrix_is_what_it_would_be_alone(effort):
    w = weights()
    each = [importance_of(inputs(1)), None, importance_of(inputs(2))]
    together = round_to_nearest(w, FMT, StackImportance(tuple(each)), effort)
    for i, importance in enumerate(each):
        alone = round_to_nearest(w[i], FMT, importance, effort)
        assert torch.equal(together.codes[i], alone.codes)
        assert torch.equal(together.scale.step[i], alone.scale.step)


def test_own_importance_lowers_the_error_of_each_output():
    w, x = weights(), [inputs(seed) for seed in range(EXPERTS)]
    own = StackImportance(tuple(importance_of(each) for each in x))
    shared = importance_of(torch.cat(x))

    def errors(importance):
        made = FMT.dequantize(round_to_nearest(w, FMT, importance, THOROUGH), torch.float32)
        return [float(((made[i] - w[i]) @ x[i].T).square().mean()) for i in range(EXPERTS)]

    for mine, peers, plain in zip(errors(own), errors(shared), errors(None), strict=True):
        assert mine < 0.95 * peers
        assert mine < 0.7 * plain


def test_a_matrix_of_which_nothing_is_known_is_no_worse_than_rounded_to_nearest():
    w = weights()
    found = round_to_nearest(w, FMT, StackImportance((importance_of(inputs(1)), None, None)), THOROUGH)
    plain = round_to_nearest(w, FMT)
    for i in (1, 2):
        mine, theirs = ((FMT.dequantize(q, torch.float32)[i] - w[i]).square().sum() for q in (found, plain))
        assert mine <= theirs


def test_without_products_no_code_moves():
    w = weights()
    nothing = StackImportance((None, Importance(torch.zeros(WIDTH)), Importance(torch.ones(WIDTH))))
    knobs = search_knobs(FMT, w, nothing, QUICK)
    assert cancelling_offsets(FMT, w, knobs, nothing, 2) is None
    some = StackImportance((None, importance_of(inputs(1)), None))
    offsets = cancelling_offsets(FMT, w, knobs, some, 2)
    assert [bool(each.any()) for each in offsets] == [False, True, False]


def test_squares_of_what_was_not_seen_are_zero():
    stack = StackImportance((None, Importance(torch.full((4,), 2.0))))
    assert torch.equal(stack.squares, torch.tensor([[0.0] * 4, [2.0] * 4]))
