"""What the environment says of a process among several, and what it may not say."""

from __future__ import annotations

import pytest

from auto_round.errors import ConfigError
from auto_round.ranks.place import Place, place
from auto_round.ranks.ranks import ALONE, divide, done_together, own_rows
from auto_round.ranks.start import check_backend

MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_a_process_alone():
    assert place({}) is None
    assert place({"WORLD_SIZE": "4"}) is None
    assert place({"RANK": "0", "WORLD_SIZE": "1", **MEETING}) is None
    assert own_rows(ALONE, range(3, 7)) == range(3, 7)


def test_one_of_several():
    assert place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MEETING}) == Place(5, 8, 1)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4", **MEETING}, "RANK is 4 and WORLD_SIZE is 4"),
        ({"RANK": "-1", "WORLD_SIZE": "4", **MEETING}, "RANK is -1"),
        ({"RANK": "one", "WORLD_SIZE": "4", **MEETING}, 'RANK is "one"'),
        ({"RANK": "0", "WORLD_SIZE": "", **MEETING}, 'WORLD_SIZE is ""'),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x", **MEETING}, 'LOCAL_RANK is "x"'),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": ""}, "MASTER_PORT"),
    ],
)
def test_contradictions_are_refused(variables, named):
    with pytest.raises(ConfigError, match=named):
        place(variables)


@pytest.mark.parametrize("name", ["glo", "tcp", ""])
def test_an_unknown_backend_is_refused_with_those_that_there_are(name):
    with pytest.raises(ConfigError, match=f'"{name}".*gloo'):
        check_backend(name)
    check_backend("gloo")
    check_backend("auto")


def test_work_is_divided_evenly_and_all_of_it():
    costs = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 1}
    shares = divide(costs, 2)
    assert sorted(name for share in shares for name in share) == sorted(costs)
    assert [sum(costs[name] for name in share) for share in shares] == [8, 8]
    assert divide({"a": 1}, 3) == [["a"], [], []]
    assert done_together(ALONE, costs, str.upper) == {name: name.upper() for name in costs}
