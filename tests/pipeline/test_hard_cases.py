"""What was hard in a run is said: massive activations, blocks kept as they started, a model far off."""

from __future__ import annotations

import pytest
import torch

from auto_round.cli.summary import summary
from auto_round.pipeline.result import Result
from auto_round.pipeline.running.hard_cases import FAR_KL, by_kind, hard_cases, matrix_errors, share_of_error
from auto_round.testing.tiny_models import tiny_config, tiny_model
from pipeline.runs import SIZES, quantize

BLOCK = {"loss": 1.0, "initial_loss": 2.0, "best_step": 10}


def entry(unit, **figures):
    return {"unit": unit, **BLOCK, "errors": {"up": 0.1, "down": 0.3}, **figures}


def relative_error(rounded, original, squares):
    matrices = (x.reshape(-1, *x.shape[-2:]) for x in (rounded, original))
    return share_of_error(matrix_errors(zip(*matrices, strict=True), squares))


def test_errors_are_shares_of_the_output():
    original = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rounded = torch.tensor([[1.5, 2.0], [3.0, 4.0]])
    assert relative_error(rounded, original, None) == pytest.approx(0.25 / 30)
    squares = torch.tensor([2.0, 0.5])
    assert relative_error(rounded, original, squares) == pytest.approx(0.5 / (2 * 10 + 0.5 * 20))
    stacked = relative_error(torch.stack([rounded] * 3), torch.stack([original] * 3), squares)
    assert stacked == pytest.approx(0.5 / 30)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2), None) == 0
    each = torch.stack([squares, torch.zeros(2)])  # of the second matrix nothing was seen
    both = relative_error(torch.stack([rounded, rounded + 9]), torch.stack([original] * 2), each)
    assert both == pytest.approx(0.5 / 30)


def test_errors_by_kind():
    names = {"0.mlp.down_proj.weight": 0.1, "1.mlp.down_proj.weight": 0.3, "0.mlp.experts.gate_up_proj": 0.5}
    assert by_kind(names) == {"down_proj": pytest.approx(0.2), "gate_up_proj": 0.5}


def test_nothing_hard_is_nothing_said():
    assert hard_cases([entry("a"), {"unit": "lm_head"}], FAR_KL) == {}
    assert hard_cases([], None) == {}


def test_each_hard_case_is_named_in_report_and_summary(tmp_path):
    entries = [
        entry("layers.0", best_step=0),
        entry("layers.1", massive_tokens=0.01, massive_energy=0.98, errors={"up": 0.2, "down": 0.5}),
        {"unit": "lm_head"},
    ]
    found = hard_cases(entries, 0.5)
    assert found["kept_as_started"] == {"units": ["layers.0"], "of": 2}
    assert found["massive_activations"]["units"] == [{"unit": "layers.1", "tokens": 0.01, "energy": 0.98}]
    assert list(found["far_from_the_original"]["largest_errors"].items()) == [("down", 0.4), ("up", 0.15)]
    report = {
        "bytes_before": 4,
        "bytes_after": {"auto_round": 1},
        "bits_per_quantized_weight": 2.25,
        "held_out": {"perplexity_before": 10.0, "perplexity_after": 20.0, "kl": 0.5},
        "hard_cases": found,
    }
    said = summary(Result((tmp_path,), None, report, 1.0, 1))
    for part in (
        "1 of 2 blocks were kept as they started",
        "1 of 2 blocks: up to 1 % of the tokens hold up to 98 % of the energy",
        "down 40 %, up 15 %",
        "--layer_config '{down: {bits: 4}}'",
    ):
        assert part in said


def test_a_model_that_is_nan_is_far_off():
    assert "far_from_the_original" in hard_cases([entry("a")], float("nan"))


def test_massive_activations_of_a_run_are_reported(tmp_path):
    model = tiny_model(tiny_config("llama", **SIZES))
    with torch.no_grad():
        model.get_input_embeddings().weight[1] *= 300
    rows = [[1, *range(3 + i, 18 + i)] for i in range(14)]
    result = quantize("live", tmp_path / "out", live=model, dataset=rows)
    found = result.report["hard_cases"]["massive_activations"]
    assert [unit["tokens"] for unit in found["units"]] == [1 / 16] * 2
    assert all(0.99 < unit["energy"] < 1 for unit in found["units"])
    assert {"q_proj", "down_proj"} < set(result.report["blocks"][0]["errors"])
