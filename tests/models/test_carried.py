"""What blocks hand on beside hidden states: how it is kept, found, and given to later blocks."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.errors import UnsupportedError
from auto_round.facts.carried import Carried, CarriedTensor, tensors_in
from auto_round.facts.flow import BlockCall
from auto_round.models.earlier_results import StubCall
from auto_round.models.find_carried import Carrier, _pieces, find_carriers
from auto_round.models.folder import FolderSource
from auto_round.pipeline.fitting.work import row_bytes
from sweep.configurations import known_families
from sweep.outcome import save_family

KEYS = CarriedTensor(("full", 0), (2, 5, 4), 0, torch.bfloat16)
VALUES = CarriedTensor(("full", 1), (2, 5, 4), 0, torch.bfloat16)
CHOSEN = CarriedTensor((), (5, 3), 0, torch.int64)


@given(shape=st.lists(st.integers(1, 5), max_size=3), axis=st.data(), rows=st.integers(1, 4))
def test_a_piece_comes_back_as_it_was(shape, axis, rows):
    place = axis.draw(st.integers(0, len(shape)))
    piece = CarriedTensor((), tuple(shape), place, torch.int64)
    x = torch.arange(rows * piece.numbers).reshape(rows, *shape).movedim(0, place)
    room = piece.room(torch.zeros(rows, 7, 8))
    kept = piece.kept(x)
    assert kept.shape == room.shape == (rows, 1, piece.numbers)
    assert torch.equal(piece.given(kept), x)
    assert all(torch.equal(piece.given(kept[i : i + 1]), x.narrow(place, i, 1)) for i in range(rows))


def test_a_mapping_is_filled_by_one_block_and_read_by_the_next():
    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    states = [x, *(piece.room(x) for piece in (KEYS, VALUES))]

    def call(present):
        shared = Carried("shared", None, UserDict(), (KEYS, VALUES), frozenset(present))
        return BlockCall((None,), {}, carried=(shared,))

    first, second = call([]), call([KEYS.path, VALUES.path])
    _, given_first = first.given(states)
    assert given_first["shared"] == UserDict()
    keys, values = torch.randn(2, 3, 2, 5, 4).bfloat16()
    given_first["shared"]["full"] = (keys, values)
    behind = [x, *first.carried_on(given_first, x, states)]
    _, given_second = second.given(behind)
    assert type(given_second["shared"]) is UserDict
    assert all(map(torch.equal, given_second["shared"]["full"], (keys, values)))
    assert all(map(torch.equal, second.carried_on(given_second, x, behind), behind[1:]))  # it fills nothing


def test_an_output_goes_to_the_next_block_as_it_is():
    x = torch.zeros(2, 5, 8, dtype=torch.bfloat16)
    states = [x, CHOSEN.room(x)]
    first = BlockCall((None,), {}, carried=(Carried("chosen", 1, None, (CHOSEN,), frozenset()),))
    _, kwargs = first.given(states)
    assert kwargs == {"chosen": None}
    chosen = torch.randint(0, 2**40, (2, 5, 3))
    behind = [x, *first.carried_on(kwargs, (x, chosen), states)]
    second = BlockCall((None,), {}, carried=(Carried("chosen", 1, None, (CHOSEN,), frozenset([()])),))
    args, kwargs = second.given(behind)
    assert args[0] is x
    assert torch.equal(kwargs["chosen"], chosen)
    assert second.carried_on(kwargs, (x, None), behind)[0] is behind[1]


def test_tensors_are_found_wherever_they_lie():
    a, b = torch.zeros(1), torch.ones(1)
    assert tensors_in(a) == {(): a}
    assert tensors_in({"k": (a, None, b)}) == {("k", 0): a, ("k", 2): b}
    assert tensors_in(None) == tensors_in({}) == tensors_in(3) == {}


def passed(index, beside, **kwargs):
    x = torch.zeros(1, 2, 3)
    return StubCall(index, (x,), (x,), BlockCall((None,), kwargs), (), beside)


def test_only_what_is_handed_on_unchanged_is_carried():
    made, shared = torch.zeros(()), {}
    found = find_carriers(
        [
            passed(0, {1: made}, chosen=None, changed=None, shared=shared, own={}),
            passed(1, {1: torch.zeros(())}, chosen=made, changed=made + 1, shared=shared, own={}),
        ]
    )
    assert found == (Carrier("shared", None, {}), Carrier("chosen", 1, None))


def test_rows_that_cannot_be_told_apart_are_refused():
    assert [piece.axis for piece in _pieces({(): torch.zeros(4, 1)}, {(): torch.zeros(4, 2)}, "x")] == [1]
    for few, many in [((4, 4), (4, 4)), ((1, 1), (2, 2)), ((8, 4), (16, 4))]:
        with pytest.raises(UnsupportedError, match='"x", in which rows cannot be told apart'):
            list(_pieces({(): torch.zeros(few)}, {(): torch.zeros(many)}, "x"))


@pytest.mark.parametrize(
    ("family", "of_a_token"),
    [
        ("llama", 0),
        ("gemma4_text", 2 * 2 * (16 + 512)),  # keys and values of 2 heads, 16 and 512 numbers each
        ("glm_moe_dsa", 4),  # tokens chosen
    ],
)
def test_what_is_handed_on_is_counted(tmp_path, family, of_a_token):
    if family not in known_families():
        pytest.skip("this Transformers has no such family")
    with FolderSource.open(save_family(family, tmp_path)) as source:
        with source.stem() as stem:
            traced = stem.trace({"input_ids": torch.zeros(1, 24, dtype=torch.int64)})
        assert sum(state.numel() for state in traced.beside) == 24 * of_a_token
        kept = 24 * of_a_token * 4  # float32, or int32
        assert source.handed_on(24, torch.float32) == kept
        assert row_bytes(source, 24, torch.float32) == 24 * source.facts.width * 4 + kept
