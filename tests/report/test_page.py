"""The page of made-up records: it parses, loads nothing, and its numbers are those of the records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from auto_round.errors import CheckpointError
from auto_round.report import draw, theme
from auto_round.report.draw import Words
from auto_round.report.one_run import page_of
from auto_round.report.page import render
from auto_round.report.plots_run import sensitivity_picture
from auto_round.report.run import LayerScore, Run, Sensitivity, run_of
from report import examples
from report.checked_html import Table, checked


def run(record=True, **changes) -> Run:
    """A run as it comes from disk."""
    values = json.loads(json.dumps(examples.report(**changes)))
    cost = json.loads(json.dumps(examples.record())) if record else None
    return run_of(values, cost, "label", Path("report.json"))


@pytest.fixture(scope="module")
def text() -> str:
    return render(page_of(run()))


@pytest.fixture(scope="module")
def page(text):
    return checked(text)


def test_the_same_records_give_the_same_page(text):
    assert render(page_of(run())) == text


def test_it_is_small(text):
    assert len(text) < 200_000


def test_names_from_outside_are_text(page, text):
    assert "tiny <b>&</b> model" in page.text
    assert "<b>" not in text


def leaves(value):
    if isinstance(value, dict):
        return {leaf for part in value.values() for leaf in leaves(part)}
    if isinstance(value, list):
        return {leaf for part in value for leaf in leaves(part)}
    return {value} if isinstance(value, (int, float)) else set()


def test_every_number_in_every_table_is_one_of_the_records(page):
    known = leaves(examples.report()) | leaves(examples.record())
    cells = [cell for t in page.tables.values() for row in t.rows for cell in row if isinstance(cell, tuple)]
    assert len(cells) > 100
    assert {value for value, _ in cells} <= known


def column(table: Table, name: str) -> list[object]:
    place = table.columns.index(name)
    return [row[place][0] if isinstance(row[place], tuple) else row[place] for row in table.rows]


BLOCKS = examples.report()["blocks"][: examples.BLOCKS]
RECORD = examples.record()
HELD = examples.report()["held_out"]


@pytest.mark.parametrize(
    ("table", "name", "wanted"),
    [
        ("Losses", "block", [b["unit"] for b in BLOCKS]),
        ("Losses", "rounded", [b["initial_loss"] for b in BLOCKS]),
        ("Losses", "tuned", [b["loss"] for b in BLOCKS]),
        ("Losses", "step kept", [b["best_step"] for b in BLOCKS]),
        ("Errors of layers", "q_proj", [b["errors"]["q_proj"] for b in BLOCKS]),
        ("Errors of layers", "up_proj", [b["errors"]["up_proj"] for b in BLOCKS]),
        ("Massive activations", "energy", [0.987654321] * 2),
        ("Massive activations", "tokens", [0.007] * 2),
        ("Plan", "bits", [4, 8, 4, 2, 16]),
        ("Plan", "stored bits", [4.1563] * 5),
        ("Plan", "blocks", ["0-1, 3-4", "2", "0-4", "0-4", "outside"]),
        ("Size and quality", "size", [90_123, 30_321, 90_123]),
        ("Size and quality", "KL", ["0", HELD["kl"], HELD["kl"]]),
        ("Size and quality", "perplexity", [HELD["perplexity_before"], *[HELD["perplexity_after"]] * 2]),
        ("Predictions by KL", "predictions", [1, 25, 60, 30, 10]),
        ("Time and memory by block", "time", [u["seconds"] for u in RECORD["units"]]),
        ("Time and memory by block", "memory held", [u["resident_bytes"] for u in RECORD["units"]]),
        ("Time and memory by block", "peak so far", [u["peak_bytes"] for u in RECORD["units"]]),
        ("Time and memory by block", "peak, accelerator", [u["device_peak_bytes"] for u in RECORD["units"]]),
        ("Time by stage", "time", [1.25, 111.5]),
        ("Rows and tokens", "how many", [6, 2, 64, 380]),
        ("Sources", "rows", [6, 2]),
        ("Tokens of experts", "least", [0, 1, 2, 3, 4]),
        ("Tokens of experts", "median", [5, 6, 7, 8, 9]),
        ("Tokens of experts", "most", [17] * 5),
        ("Tokens of experts", "without any", [1, 0, 0, 0, 0]),
        ("Scripts", "letters", [1234, 56]),
        ("Sources", "samples read", [9, 2]),
        ("Sources", "dropped", ["3 too short", "none"]),
        (
            "What was chosen",
            "value",
            ["4 bits per weight", 3.9876, 0.0456789, HELD["kl"], 0.0012, "W2A16, W4A16"],
        ),
        ("Sensitivity", "W2A16", [0.5 / (i + 1) for i in range(5)]),
        ("Sensitivity", "W4A16", [0.0123 / (i + 1) for i in range(5)]),
    ],
)
def test_columns_are_those_of_the_records(page, table, name, wanted):
    assert column(page.tables[table], name) == wanted


def test_the_head_has_a_row_in_the_picture_of_sensitivities():
    layers = [LayerScore("q_proj", 0, {"W2": 0.1}), LayerScore("q_proj", 1, {"W2": 0.3})]
    scores = Sensitivity("measured", (LayerScore("lm_head", None, {"W2": 0.2}), *layers))
    assert "lm_head" in sensitivity_picture(Words("a", "b", "c"), scores, "W2").svg


def test_what_is_shown_is_the_number_rounded(page):
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "%": 0.01, "B": 1, "s": 1, "": 1}
    seen = 0
    for table in page.tables.values():
        for row in table.rows:
            for cell in row:
                if isinstance(cell, tuple) and "min" not in cell[1]:
                    shown, _, unit = cell[1].replace(",", "").partition(" ")
                    assert float(shown) * units[unit] == pytest.approx(
                        cell[0], rel=0.006, abs=0.5 * (unit == "s")
                    )
                    seen += 1
    assert seen > 100


def test_every_picture_has_its_numbers_under_it_and_words_for_those_who_do_not_see_it(page):
    pictures = [found for tag, found in page.tags if tag == "svg"]
    assert len(pictures) == 9
    assert [tag for tag, _ in page.tags].count("details") >= len(pictures)
    for key in ("plan", "losses", "errors", "massive", "quality", "spread", "cost", "sensitivity", "experts"):
        assert f"{key}-picture-title" in page.ids
        assert f"{key}-picture-text" in page.ids


def test_hard_cases_and_the_command_are_said(page):
    for part in (
        "means that the model says other things than the original",
        "q_proj 6 %",
        "1 of 15 experts saw no token",
        "All blocks learned together for 20 steps on 20,480 tokens",
        "step 20 was kept",
        "1 of 5 blocks were kept as they started",
        "fake was not reloaded: there was no memory",
        'auto-round a/model --layer_config \'{"q_proj": {"bits": 8}}\'',
        "lr_scheduler: <function>",
        "a processor, a card",
        "not installed",
    ):
        assert part in page.text


def test_colours_are_left_to_the_reader_s_setting(text):
    drawn = text.split("<figure>", 1)[1]
    left = {pair[0] for pair in theme.TONES.values()} & set(draw_colours(drawn))
    assert not left
    assert draw_colours(drawn) == []
    assert "prefers-color-scheme: dark" in text


def draw_colours(text: str) -> list[str]:
    import re

    return re.findall(r"#[0-9a-f]{6}\b", text)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("tone", ["ink", "muted", "accent", "before", "third", "fourth"])
def test_words_and_lines_can_be_read_on_the_card(tone, dark):
    """4.5 is what WCAG 2 asks of text (success criterion 1.4.3)."""
    for ground in ("card", "page"):
        assert contrast(theme.TONES[tone][dark], theme.TONES[ground][dark]) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 16])
def test_bits_can_be_read_in_their_cells(bits, dark):
    assert contrast(theme.TONES["on-cell"][dark], theme.TONES[theme.tone_of_bits(bits)][dark]) >= 4.5


def test_no_colour_stands_for_two_things():
    assert len({pair[0] for pair in theme.TONES.values()}) == len(theme.TONES)


OLD = (
    "distillation",
    "plan",
    "calibration",
    "held_out",
    "sensitivity",
    "hard_cases",
    "engines",
    "verified",
    "model",
    "seed",
    "auto_scheme",
)


@pytest.mark.parametrize(
    ("without", "record"),
    [((), False), (OLD, False), (("blocks", *OLD), False), (("blocks",), True), (("held_out",), True)],
)
def test_records_of_less_give_a_page_of_less(without, record):
    values = {k: v for k, v in examples.report().items() if k not in without}
    found = run_of(values, examples.record() if record else None, "x", Path("report.json"))
    page = checked(render(page_of(found)))
    assert ("Quality was not measured" in page.text) == ("held_out" in without)


@pytest.mark.parametrize("kl", [math.nan, math.inf, 0.0])
def test_a_model_that_is_broken_or_perfect_has_a_page(kl):
    blocks = [{"unit": "b", "errors": {"q": kl, "k": 0.1}, "loss": kl, "initial_loss": kl, "best_step": 0}]
    checked(render(page_of(run(held_out={**HELD, "kl": kl}, blocks=blocks))))


def test_one_block_and_one_kind_of_layer():
    plan = [{**examples.report()["plan"][0], "blocks": [[0, 0]]}]
    blocks = [{"unit": "b", "errors": {"q": 0.1}, "loss": 1.0, "initial_loss": 2.0, "best_step": 1}]
    checked(render(page_of(run(plan=plan, blocks=blocks))))


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes_after": None},
        {"plan": [{"kind": "x"}]},
        {"blocks": 3},
        {"held_out": {"kl": 1.0}},
        {"calibration": "rows"},
        {"layers": None},
    ],
    ids=str,
)
def test_a_record_that_is_none_is_refused_by_name(changes):
    with pytest.raises(CheckpointError, match=r"report\.json: not the report of a run"):
        render(page_of(run(**changes)))


def test_without_the_plotting_library_it_says_how_to_install_it(monkeypatch):
    from auto_round.errors import ConfigError

    monkeypatch.setattr(draw.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'matplotlib and jinja2.*pip install "auto-round\[report\]"'):
        render(page_of(run()))
