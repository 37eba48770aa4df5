"""Real runs write what their page needs, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from auto_round import AutoRound
from auto_round.checkpoint.record import read_record
from auto_round.cli.main import main
from auto_round.errors import ConfigError
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.report import draw
from auto_round.report.record import PAGE, REPORT, RUN_RECORD, RunRecord
from pipeline.runs import ROWS, SHORT, quantize, tree
from report.checked_html import checked


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Folder of a tuned run with two formats, a mixed plan, and a page."""
    out = tmp_path_factory.mktemp("run") / "out"
    mixed = {"layer_config": {"k_proj": {"bits": 8}}, "format": "auto_round,fake"}
    quantize(tiny("llama"), out, **mixed, report=True)
    return out


def records(folder: Path):
    return json.loads((folder / REPORT).read_text()), json.loads((folder / RUN_RECORD).read_text())


def test_a_run_writes_one_page_that_holds_its_records(finished):
    assert [p.relative_to(finished).as_posix() for p in finished.rglob(PAGE)] == [PAGE]
    report, record = records(finished)
    page = checked((finished / PAGE).read_text())
    losses = page.tables["Losses"]
    assert [row[1][0] for row in losses.rows] == [b["initial_loss"] for b in report["blocks"]]
    assert [row[2][0] for row in losses.rows] == [b["loss"] for b in report["blocks"]]
    times = page.tables["Time and memory by block"]
    assert [row[1][0] for row in times.rows] == [unit["seconds"] for unit in record["units"]]
    assert record["command"] in page.text


def test_the_page_is_made_again_from_the_records_alone(finished, tmp_path):
    for name in (REPORT, RUN_RECORD):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes((finished / name).read_bytes())
    assert main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / PAGE).read_bytes() == (finished / PAGE).read_bytes()


def test_the_plan_in_the_report_is_the_whole_plan(finished):
    plan = records(finished)[0]["plan"]
    bits = {line["kind"]: line["bits"] for line in plan}
    assert bits.pop("self_attn.k_proj") == 8
    assert bits.pop("lm_head") == 16
    assert set(bits.values()) == {4}
    assert [line["blocks"] for line in plan] == [[[0, 1]]] * 7 + [[]]
    (k_proj,) = [line for line in plan if line["kind"] == "self_attn.k_proj"]
    assert (
        k_proj["stored_bits"] == 8 + (16 + 8) / 32
    )  # a step of 16 bits and a packed zero point for 32 weights
    assert k_proj["reason"] == 'layer_config "k_proj"'


def test_the_held_out_rows_are_all_in_the_histogram(finished):
    held = records(finished)[0]["held_out"]
    assert sum(held["kl_histogram"]["positions"]) == held["positions"]


def test_sources_and_tokens_are_counted(finished):
    data = records(finished)[0]["calibration"]
    assert data["tokens_tuned"] == SHORT["nsamples"] * SHORT["seqlen"]
    assert sum(source["rows"] for source in data["sources"]) == data["rows_tuned"] + data["rows_held_out"]


def test_costs_are_kept_apart_from_what_equal_runs_write_equal(finished):
    report, record = records(finished)
    assert not any("cost" in block for block in report["blocks"])
    found = RunRecord.from_json(record)
    assert found.to_json() == RunRecord.from_json(json.loads(json.dumps(found.to_json()))).to_json()
    assert [unit.unit for unit in found.units] == [block["unit"] for block in report["blocks"]]
    assert all(unit.seconds > 0 for unit in found.units)
    assert sum(unit.seconds for unit in found.units) == pytest.approx(found.stages["tune"], abs=0.02)
    assert sum(found.stages.values()) == pytest.approx(found.seconds, abs=2)
    assert {"prepare", "smooth", "trace", "tune", "measure", "write", "verify"} == set(found.stages)


def test_a_run_without_it_writes_all_but_the_page(tiny, tmp_path, finished):
    mixed = {"layer_config": {"k_proj": {"bits": 8}}, "format": "auto_round,fake"}
    quantize(tiny("llama"), tmp_path / "out", **mixed)
    assert not list(tmp_path.rglob(PAGE))
    files = tree(finished)
    files.pop(PAGE)
    own = tree(tmp_path / "out")
    asked = [json.loads(found.pop(".auto_round.json")) for found in (files, own)]
    assert set(own) == set(files)
    assert asked[0]["asked"] == asked[1]["asked"]
    quantize(tiny("llama"), tmp_path / "out", **mixed, report=True)  # nothing is done but the page
    assert (tmp_path / "out" / PAGE).is_file()
    assert PAGE in read_record(tmp_path / "out").files
    quantize(tiny("llama"), tmp_path / "out", **{**mixed, "seed": 7})
    assert not (tmp_path / "out" / PAGE).exists()  # a page of another run would lie


def test_plain_rounding_has_a_page_too(tiny, tmp_path):
    quantize(tiny("llama"), tmp_path / "out", iters=0, disable_opt_rtn=True, dataset=None, report=True)
    page = checked((tmp_path / "out" / PAGE).read_text())
    assert "Quality was not measured" in page.text
    assert [row[0] for row in page.tables["Time by stage"].rows] == ["prepare", "round", "write", "verify"]


def test_tokens_of_experts_are_counted(tiny, tmp_path):
    result = quantize(tiny("qwen3_moe"), tmp_path / "out", iters=0)
    for block in result.report["blocks"]:
        (counts,) = block["experts"].values()
        assert sum(counts) == SHORT["nsamples"] * SHORT["seqlen"] * 2  # a token passes through two of four


def test_python_writes_it_for_every_output_of_a_run(tiny, tmp_path):
    given = {k: v for k, v in SHORT.items() if k not in ("device_map",)}
    ar = AutoRound(str(tiny("llama")), dataset=ROWS, device_map="cpu", report=True, **given)
    ar.quantize()
    ar.save_quantized(tmp_path / "out", format="auto_gptq")
    page = checked((tmp_path / "out" / PAGE).read_text())
    assert "Time and memory by block" in page.tables
    assert "dataset: list given from Python" in page.text


def test_a_missing_package_is_said_before_work(tiny, tmp_path, monkeypatch):
    from auto_round.config import build_options

    monkeypatch.setattr(draw.importlib.util, "find_spec", lambda name: None)
    options = build_options(
        {"model": str(tiny("llama")), "output_dir": str(tmp_path / "out"), "report": True}
    )
    with pytest.raises(ConfigError, match=r"pip install"):
        prepare(options)
