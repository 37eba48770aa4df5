"""A page that compares runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from auto_round.cli.main import main
from auto_round.report.page import render
from auto_round.report.plots_quality import Point, frontier_of
from auto_round.report.run import run_of
from auto_round.report.several_runs import page_of_all
from report import examples
from report.checked_html import checked

RUNS = {"w2": (10_000, 0.9), "w3": (20_000, 0.2), "w4 <worse>": (25_000, 0.25), "w8": (40_000, 0.01)}


def runs(**changes):
    found = []
    for label, (nbytes, kl) in RUNS.items():
        held = {**examples.report()["held_out"], "kl": kl}
        values = examples.report(bytes_after={"auto_round": nbytes}, held_out=held, **changes)
        found.append(run_of(values, examples.record(), label, Path("report.json")))
    return found


def test_the_frontier_holds_what_no_other_run_beats():
    points = [Point(name, name, *values) for name, values in RUNS.items()]
    assert [p.label for p in frontier_of(points)] == ["w2", "w3", "w8"]
    assert [p.label for p in frontier_of(points[::-1])] == ["w2", "w3", "w8"]
    alike = [Point("a", "a", 1, 1.0), Point("b", "b", 1, 1.0), Point("c", "c", 1, 0.5)]
    assert [p.label for p in frontier_of(alike)] == ["c"]


def test_figures_of_all_runs_stand_in_its_tables():
    page = checked(render(page_of_all(runs())))
    quality, table = page.tables["Size and quality"], page.tables["Runs"]
    assert [row[1][0] for row in quality.rows] == [nbytes for nbytes, _ in RUNS.values()]
    assert [row[2][0] for row in quality.rows] == [kl for _, kl in RUNS.values()]
    assert [row[3] for row in quality.rows] == ["yes", "yes", "no", "yes"]
    assert [row[0] for row in table.rows] == [f"{i} {label}" for i, label in enumerate(RUNS, 1)]
    assert [row[table.columns.index("KL")][0] for row in table.rows] == [kl for _, kl in RUNS.values()]
    assert [row[table.columns.index("time")][0] for row in table.rows] == [123.456] * len(RUNS)
    losses = [block["loss"] for block in examples.report()["blocks"][: examples.BLOCKS]]
    assert [[cell[0] for cell in row[1:]] for row in page.tables["Losses"].rows] == [[x] * 4 for x in losses]
    assert page.tables["Predictions by KL"].columns == ["KL, nats", *RUNS]
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 3


def test_what_cannot_be_compared_is_said():
    first, *rest = runs()
    data = {**examples.report()["calibration"], "fingerprint": "0" * 64}
    (other, *_) = runs(calibration=data, model="another")
    assert not checked(render(page_of_all([first, *rest]))).text.count("different")
    page = checked(render(page_of_all([first, other])))
    assert "different models" in page.text
    assert "measured on different rows" in page.text
    (unmeasured, *_) = [run_of(examples.report(held_out=None), None, "x", Path("r"))]
    assert "Quality was not measured in x" in checked(render(page_of_all([first, unmeasured]))).text
    assert "Size and quality" not in checked(render(page_of_all([unmeasured] * 2))).tables


@pytest.fixture
def folders(tmp_path):
    made = []
    for name in ("a/out", "b/out", "c"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(examples.report()))
        (folder / "report_run.json").write_text(json.dumps(examples.record()))
        made.append(folder)
    return made


def test_runs_of_one_name_are_told_apart_by_the_folders_above(folders, tmp_path, capsys):
    file = tmp_path / "new.html"
    assert main(["report", *map(str, folders), "-o", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    page = checked(file.read_text())
    assert [row[0] for row in page.tables["Runs"].rows] == ["1 a/out", "2 b/out", f"3 {tmp_path.name}/c"]


def test_the_record_may_be_named_itself(folders, capsys):
    assert main(["report", str(folders[0] / "report.json")]) == 0
    assert (folders[0] / "report.html").is_file()
    assert main(["report", str(folders[0])]) == 0  # it may be made again


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{0}", "{1}"], "-o FILE.html"),
        (["{0}", "{0}", "-o", "x.html"], "named twice"),
        (["{0}/.."], "no report.json in it; expected one of"),
        (["nowhere"], "nowhere is not the output of a finished run"),
        (["{0}", "-o", "{1}/report.json"], "no page of auto-round"),
        (["{0}", "--outptu", "x"], 'unknown flag --outptu: did you mean "--output"'),
    ],
)
def test_what_cannot_be_is_refused(folders, words, said, capsys):
    assert main(["report", *(word.format(*folders) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_a_damaged_record_is_named(folders, capsys):
    (folders[0] / "report_run.json").write_text('{"command": ')
    assert main(["report", str(folders[0])]) == 1
    assert "report_run.json is damaged" in capsys.readouterr().err


def test_help(capsys):
    assert main(["report"]) == 0
    assert "output folder of a finished run" in capsys.readouterr().out
