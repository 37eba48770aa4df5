"""The garbage collector looks less often while the package works, and as before once it is done."""

from __future__ import annotations

import gc

import pytest

from auto_round import AutoRound
from auto_round.collector import quiet_collector
from auto_round.errors import AutoRoundError


def test_the_collector_is_what_it_was_afterwards():
    before, inside = gc.get_threshold(), []

    @quiet_collector()
    def work(fails):
        inside.append(gc.get_threshold())
        if fails:
            raise ValueError

    work(False)
    with pytest.raises(ValueError):
        work(True)
    assert gc.get_threshold() == before
    assert all(found[0] > before[0] and found[1:] == before[1:] for found in inside)


@pytest.mark.parametrize("work", ["quantize", "quantize_and_save"])
def test_calls_leave_it_as_it_was(monkeypatch, tmp_path, work):
    before, inside = gc.get_threshold(), []
    rounder = AutoRound(str(tmp_path / "nothing"), iters=0, output_dir=str(tmp_path / "out"))
    prepare = AutoRound._prepare
    monkeypatch.setattr(
        AutoRound, "_prepare", lambda *a, **k: inside.append(gc.get_threshold()[0]) or prepare(*a, **k)
    )
    with pytest.raises(AutoRoundError):
        getattr(rounder, work)()
    assert inside[0] > before[0]
    assert gc.get_threshold() == before
