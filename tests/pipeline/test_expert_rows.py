"""Coverage of experts: what saw no token is rounded without data and counted; rows are added where asked."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.cli.summary import summary
from auto_round.pipeline.running.coverage import coverage, coverage_sentence
from pipeline.runs import SIZES, Stop, quantize, stop_after, token_rows, tree

GIVEN = {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 16}
BASE, HELD, LENGTH = 2, 2, 16
ROWS = token_rows(24, LENGTH)


def tokens_of(folder, rows):
    """Tokens of each expert by Transformers' own routers: module -> `[rows, n_experts]`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for i in range(2):
        module = model.model.layers[i].mlp.experts
        module.register_forward_pre_hook(
            lambda module, args, i=i: found.setdefault(i, []).append(
                torch.bincount(args[1].flatten(), minlength=8)
            )
        )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    return {f"model.layers.{i}.mlp.experts": torch.stack(counts) for i, counts in found.items()}


def seen(result):
    return {
        n: torch.tensor(c) for entry in result.report["blocks"] for n, c in entry.get("experts", {}).items()
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from auto_round.testing.tiny_models import save_tiny_model

    return save_tiny_model("qwen3_moe", tmp_path_factory.mktemp("moe") / "m", **SIZES, **GIVEN)


def run(model, out, **given):
    return quantize(
        model,
        out,
        dataset=ROWS,
        iters=0,
        disable_opt_rtn=False,
        **{"nsamples": BASE, "verify": False, "amp": False, **given},
    )


def test_unseen_experts_are_counted_and_said(model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = run(model, tmp_path / "out")
    wanted = {name: counts.sum(0) for name, counts in tokens_of(model, ROWS[:BASE]).items()}
    assert {n: c.tolist() for n, c in seen(result).items()} == {n: c.tolist() for n, c in wanted.items()}
    unseen = sum(int((counts == 0).sum()) for counts in wanted.values())
    assert unseen
    said = result.report["experts"]
    assert said == {"experts": 16, "unseen": unseen, "fewest": 0}
    assert f"{unseen} of 16 experts saw no calibration token" in caplog.text
    assert f"{unseen} of 16 experts saw no calibration token" in summary(result)


def test_rows_are_added_until_each_expert_saw_enough(model, tmp_path):
    wanted = 6
    result = run(model, tmp_path / "out", expert_rows=wanted)
    by_row = tokens_of(model, ROWS)
    lacking = {name: (wanted - counts[:BASE].sum(0)).clamp_min(0) for name, counts in by_row.items()}
    taken = list(range(BASE))
    for row in range(BASE + HELD, len(ROWS)):  # those between are held out
        if any(bool((by_row[name][row] * left).any()) for name, left in lacking.items()):
            taken.append(row)
            lacking = {name: (left - by_row[name][row]).clamp_min(0) for name, left in lacking.items()}
    assert len(taken) > BASE
    for name, counts in seen(result).items():
        assert counts.tolist() == by_row[name][taken].sum(0).tolist()
    assert result.report["calibration"]["rows_tuned"] == len(taken)
    assert result.report["calibration"]["rows_held_out"] == HELD
    below = sum(int((left > 0).sum()) for left in lacking.values())
    said = result.report["experts"]
    assert (said["wanted"], said["below"], len(said["fewest_tokens"])) == (wanted, below, min(below, 8))
    assert all(count < wanted for count in said["fewest_tokens"].values())
    assert f"{below} of 16 experts saw fewer than {wanted}" in summary(result) or not below


def test_no_row_is_added_where_all_have_enough(model, tmp_path):
    every = run(model, tmp_path / "few", expert_rows=1, nsamples=20)
    assert every.report["calibration"]["rows_tuned"] == 20
    assert every.report["experts"]["below"] == every.report["experts"]["unseen"]


def test_an_interrupted_run_goes_on_with_the_same_rows(model, tmp_path):
    run(model, tmp_path / "whole", expert_rows=6)
    with pytest.raises(Stop):
        run(model, tmp_path / "out", expert_rows=6, progress=stop_after(1))
    run(model, tmp_path / "out", expert_rows=6)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_dense_models_and_data_that_are_read_once_are_told(model, tiny, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        quantize(tiny("qwen3", head_dim=16), tmp_path / "dense", expert_rows=6, verify=False)
        assert "expert_rows has no effect: the model sends tokens to no experts" in caplog.text
        quantize(
            model, tmp_path / "once", dataset=iter(ROWS), expert_rows=6, iters=1, nsamples=2, verify=False
        )
    assert "expert_rows adds none: the calibration data can be read only once" in caplog.text


def test_what_a_report_says_of_experts():
    entries = [
        {"unit": "a", "experts": {"m": [5, 0, 9]}},
        {"unit": "b"},
        {"unit": "c", "experts": {"n": [3, 7]}},
    ]
    assert coverage(entries) == {"experts": 5, "unseen": 1, "fewest": 0}
    found = coverage(entries, 6)
    assert found["below"] == 3
    assert list(found["fewest_tokens"].items()) == [("m.1", 0), ("n.0", 3), ("m.0", 5)]
    assert coverage_sentence(found).startswith(
        "3 of 5 experts saw fewer than 6 calibration tokens, 1 of them"
    )
    assert coverage([{"unit": "b"}], 6) == {}
    assert coverage_sentence({}) == coverage_sentence(coverage(entries[2:])) == ""
