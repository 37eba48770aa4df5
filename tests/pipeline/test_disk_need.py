"""The disk that a run fills: counted before it begins, and refused where it is too small."""

from __future__ import annotations

import math
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from auto_round.config import build_options
from auto_round.errors import ConfigError
from auto_round.pipeline.disk_need import DiskNeed
from auto_round.pipeline.dry_run import dry_run
from auto_round.units import size
from pipeline.runs import ROWS, SHORT, Stop, quantize, stop_after, token_rows

DISTILLED = {"distill_steps": 2, "distill_nsamples": 3}
DATA = token_rows(20)
Usage = namedtuple("Usage", "total used free")


def need(model: Path, out: Path, **given: object) -> DiskNeed:
    return dry_run(build_options({**SHORT, "model": str(model), "output_dir": str(out), **given})).disk


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - free, free))


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"nsamples": 8, "memory": "lowest"},
        {**DISTILLED},
        {**DISTILLED, "memory": "lowest"},
        {**DISTILLED, "distill_scales_only": True},
    ],
)
def test_no_run_writes_more_than_was_counted(model, tmp_path, given):
    partial, seen = tmp_path / "out.partial", [0]

    def measure(_: object) -> None:
        files = [f.stat() for f in partial.rglob("*") if f.is_file()]
        seen.append(sum(f.st_size for f in files))

    quantize(model, tmp_path / "out", dataset=DATA, progress=measure, verify=False, **given)
    counted = need(model, tmp_path / "other", **given)
    # Headers, the journal and files beside weights: some kB, whatever the model's size.
    assert max(seen) <= counted.total + (1 << 18)


def test_parts_of_the_scratch(model, tmp_path):
    base = need(model, tmp_path / "out")
    assert need(model, tmp_path / "out", nsamples=512, seqlen=64).saved > 100 * base.saved > 0
    assert base.spilled == base.together == 0
    assert need(model, tmp_path / "out", memory="lowest").spilled == 3 * base.saved // 4
    assert need(model, tmp_path / "out", resume=False).scratch == 0
    assert need(model, tmp_path / "out", iters=0, disable_opt_rtn=True).scratch == 0
    together = need(model, tmp_path / "out", **DISTILLED).together
    assert 14 * need(model, tmp_path / "out", **DISTILLED, distill_scales_only=True).together == together


def test_a_disk_without_room_for_the_scratch_is_refused_before_work(model, tmp_path, monkeypatch):
    counted = need(model, tmp_path / "out", **DISTILLED)
    with_free(monkeypatch, counted.output + counted.scratch // 2)  # enough for the output
    events: list[object] = []
    with pytest.raises(ConfigError) as error:
        quantize(model, tmp_path / "out", dataset=DATA, progress=events.append, **DISTILLED)
    told = str(error.value)
    assert told.startswith(f"{tmp_path / 'out.partial'}: this run writes {size(counted.total)} there")
    assert f"states of distill_steps {size(counted.together)}" in told
    assert f"its disk has {size(counted.output + counted.scratch // 2)} free" in told
    assert re.search("output folder on another disk.*distill_scales_only.*nsamples", told)
    assert not events
    assert not list(tmp_path.glob("out*"))  # nothing is left of it
    monkeypatch.undo()
    with_free(monkeypatch, counted.total + (1 << 20))
    quantize(model, tmp_path / "out", dataset=DATA, verify=False, **DISTILLED)


def test_what_a_killed_run_left_is_not_needed_again(model, tmp_path, monkeypatch):
    big = {"dataset": ROWS, "verify": False}
    with pytest.raises(Stop):
        quantize(model, tmp_path / "out", **big, progress=stop_after(1))
    counted = need(model, tmp_path / "out")
    with_free(monkeypatch, math.ceil(0.6 * counted.total))
    with pytest.raises(ConfigError, match="but its disk has"):
        quantize(model, tmp_path / "new", **big)
    quantize(model, tmp_path / "out", **big)
