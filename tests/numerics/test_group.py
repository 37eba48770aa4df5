"""Groups cut the last axis, and nothing is lost or mixed."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.numerics.group import Group


@given(
    size=st.integers(-1, 20),
    lead=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 4),
    n_in=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_join_undoes_split_and_groups_hold_neighbours(size, lead, rows, n_in):
    shape = (*lead, rows, n_in)
    w = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    group = Group(size)
    grouped = group.split(w)
    assert torch.equal(group.join(grouped, shape), w)
    assert grouped.shape[:-1] == group.scale_shape(shape)
    if size > 0:
        width = min(size, n_in)
        assert group.count(n_in) == len(range(0, n_in, width))
        for g, start in enumerate(range(0, n_in, width)):
            want = w[..., start : start + width]
            assert torch.equal(grouped[..., g, : want.shape[-1]], want)
            assert (grouped[..., g, want.shape[-1] :] == 0).all()
    elif size == 0:
        assert grouped.shape == (*lead, 1, 1, rows * n_in)
    else:
        assert torch.equal(grouped.squeeze(-2), w)


@given(size=st.integers(-1, 20), rows=st.integers(1, 4), n_out=st.integers(1, 9), n_in=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_values_of_groups_spread_by_input_are_those_of_each_weight(size, rows, n_out, n_in):
    group = Group(size, rows if size else 1)
    places = torch.arange(1.0, 1 + torch.Size(group.scale_shape((n_out, n_in))).numel())
    values = places.reshape(group.scale_shape((n_out, n_in)))
    assert torch.equal(group.spread_by_input(values, (n_out, n_in)), group.spread(values, (n_out, n_in)).T)
