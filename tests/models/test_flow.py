"""How what flows is laid out, and how it is kept."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.facts.flow import Axes

SIZES = st.integers(1, 8)


@given(
    others=st.lists(SIZES, min_size=1, max_size=3),
    one=st.tuples(SIZES, SIZES),
    grown=st.permutations([9, 10]),
    places=st.data(),
)
def test_axes_are_found_and_undone(others, one, grown, places):
    """Wherever rows and tokens stand, a tensor comes back as it was; and row and token keep their numbers."""
    dims = len(others) + 2
    rows, tokens = places.draw(st.permutations(range(dims)))[:2]

    def shape(counts):
        left = iter(others)
        return tuple(
            counts[0] if a == rows else counts[1] if a == tokens else next(left) for a in range(dims)
        )

    two = tuple(grown)
    axes = Axes.found(shape(one), shape(two), two)
    if (rows, tokens, dims) == (0, 1, 3):
        assert axes is None
        return
    assert axes == Axes(rows, tokens, tuple(others))
    x = torch.arange(torch.Size(shape(two)).numel()).reshape(shape(two))
    kept = axes.kept(x)
    assert kept.shape[:2] == two
    assert kept.dim() == 3
    assert torch.equal(axes.given(kept), x)
    assert torch.equal(
        kept[1, 2],
        x.select(max(rows, tokens), 2 if tokens > rows else 1)
        .select(min(rows, tokens), 1 if tokens > rows else 2)
        .flatten(),
    )


def test_axes_that_cannot_be_told():
    assert Axes.found((2, 3, 8), (5, 7, 8), (5, 7)) is None  # as it is kept
    assert Axes.found((1, 68, 64), (1, 72, 64), (5, 7)) is None  # tokens of its own before the row's
    assert Axes.found((2, 9, 8), (5, 9, 8), (5, 7)) is None  # no axis of tokens
    assert Axes.found((2, 3, 8), (5, 7, 8, 1), (5, 7)) is None
