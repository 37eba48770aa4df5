"""What `auto-round eval` measured, on the pages of runs."""

from __future__ import annotations

import json

import pytest

from auto_round.cli.main import main
from auto_round.report.make import make_page
from report import examples
from report.checked_html import checked


@pytest.fixture
def folders(tmp_path):
    made = []
    for name, scale in (("one", 1.0), ("two", 3.0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(examples.report()))
        found = examples.evaluation()
        found["kl"] = {**found["kl"], "mean": {"value": scale, "low": scale / 2, "high": scale * 2}}
        folder.with_name(f"{name}.evaluation.json").write_text(json.dumps(found))
        made.append(folder)
    return made


def test_quantiles_with_their_intervals_stand_on_the_page_of_a_run(folders):
    page = checked(make_page(folders[:1]).read_text())
    assert "Fidelity on a text" in page.text
    assert "wiki <test>.txt" in page.text
    table = page.tables["Divergence on a text"]
    assert [row[0] for row in table.rows] == ["mean", "median", "90 %", "99 %", "99.9 %", "largest"]
    wanted = examples.evaluation()
    assert [cell[0] for cell in table.rows[3][1:]] == [
        wanted[way]["p99"][end] for way in ("kl", "kl_reverse") for end in ("value", "low", "high")
    ]
    agreement = {row[0]: row[1] for row in page.tables["Agreement on a text"].rows}
    assert agreement["same top token"][0] == 0.8125
    assert agreement["KL of the original in another dtype"][0] == 0.00021


def test_runs_are_compared_by_quantiles(folders, tmp_path):
    page = checked(make_page(folders, tmp_path / "both.html").read_text())
    rows = page.tables["Divergence on a text"].rows
    assert [row[0] for row in rows] == ["one", "two"]
    assert [row[1][0] for row in rows] == [1.0, 3.0]
    assert "one is nearest to its original" in page.text
    assert "different texts" not in page.text
    other = examples.evaluation(positions=17)
    folders[1].with_name("two.evaluation.json").write_text(json.dumps(other))
    assert "different texts" in checked(make_page(folders, tmp_path / "both.html").read_text()).text


def test_a_run_that_was_not_measured_is_left_out(folders, tmp_path):
    folders[1].with_name("two.evaluation.json").unlink()
    page = checked(make_page(folders, tmp_path / "both.html").read_text())
    assert [row[0] for row in page.tables["Divergence on a text"].rows] == ["one"]
    tasks = {"model": "two", "tasks": {}}
    folders[1].with_name("two.evaluation.json").write_text(json.dumps(tasks))
    assert "Fidelity" not in checked(make_page(folders[1:]).read_text()).text


@pytest.mark.parametrize("broken", [{"kl": {"mean": 1}}, {"perplexity": None}, {"same_top": {"value": "a"}}])
def test_a_file_of_something_else_is_named(folders, broken, capsys):
    folders[0].with_name("one.evaluation.json").write_text(json.dumps(examples.evaluation(**broken)))
    assert main(["report", str(folders[0])]) == 1
    assert "one.evaluation.json: not what auto-round eval writes" in capsys.readouterr().err
