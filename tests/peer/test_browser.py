"""Pages in a real browser: nothing is loaded, nothing fails, everything can be seen on any screen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from auto_round.report.one_run import page_of
from auto_round.report.page import render
from auto_round.report.run import run_of
from auto_round.report.several_runs import page_of_all
from auto_round.report.theme import TONES
from peer.peers import Peer
from report import examples

pytestmark = pytest.mark.peer

BROWSER = Peer("PEER_BROWSER", "playwright, and chromium on the PATH")
WIDTHS = (320, 400, 1600)
SMALLEST_LETTERS = 9.0
"""Pixels from top to bottom of the smallest letters on a phone."""


def pages() -> dict[str, str]:
    run = run_of(examples.report(), examples.record(), "run", Path("r"))
    long = {f"model.layers.{i}": 0.1 * (i + 1) for i in range(80)}
    blocks = [
        {"unit": name, "initial_loss": x, "loss": x / 2, "best_step": 1, "errors": {"q_proj": x / 9}}
        for name, x in long.items()
    ]
    line = {**examples.report()["plan"][0], "blocks": [[i, i] for i in range(0, 80, 2)]}
    deep = run_of(examples.report(blocks=blocks, plan=[line]), None, "deep", Path("r"))
    few = run_of(examples.report(blocks=[], plan=[], held_out=None), None, "few", Path("r"))
    return {
        "run": render(page_of(run)),
        "deep": render(page_of(deep)),
        "few": render(page_of(few)),
        "compared": render(page_of_all([run, deep, few])),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Page -> width and scheme -> what the browser said."""
    BROWSER.python()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on the PATH (see tests/peer/README.md)")
    scratch = tmp_path_factory.mktemp("pages")
    jobs = []
    for name, text in pages().items():
        (scratch / f"{name}.html").write_text(text)
        jobs.append({"page": str(scratch / f"{name}.html"), "widths": WIDTHS, "out": str(scratch / name)})
    BROWSER.run("look_with_chromium.py", {"chromium": chromium, "jobs": jobs}, scratch)
    return {name: json.loads((scratch / f"{name}.json").read_text()) for name in pages()}


NAMES = ("run", "deep", "few", "compared")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_asks_for_nothing_and_no_error_is_logged(seen, name):
    for found in seen[name].values():
        assert len(found["asked"]) == 1  # itself
        assert found["asked"][0].startswith("file:")
        assert found["said"] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_page_is_wider_than_its_window_also_with_all_numbers_open(seen, name):
    for key, found in seen[name].items():
        for page, window in (found["page"], found["opened"]):
            assert page <= window, key


@pytest.mark.parametrize(("name", "count"), [("run", 9), ("deep", 6), ("few", 1), ("compared", 3)])
def test_every_picture_is_there_and_its_letters_can_be_read(seen, name, count):
    for key, found in seen[name].items():
        assert len(found["pictures"]) == count
        for picture in found["pictures"]:
            assert picture["marks"] > 8, key
            assert picture["height"] > 50, key
            assert picture["inside"], key
            assert picture["letters"] >= SMALLEST_LETTERS * min(1, int(key.split("-")[0]) / 400), key


def test_the_readers_setting_decides_between_light_and_dark(seen):
    for name in NAMES:
        for key, found in seen[name].items():
            colour = TONES["page"][key.endswith("dark")]
            wanted = ", ".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
            assert found["background"] == f"rgb({wanted})"


def test_the_keyboard_finds_the_way_past_the_heading(seen):
    assert {found["focus"] for found in seen["run"].values()} == {"Skip to the figures"}
