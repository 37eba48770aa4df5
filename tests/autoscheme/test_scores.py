"""Sensitivities: the same for any batch, placement and order of work, and never silently wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from auto_round.autoscheme import by_divergence, by_gradients, scores
from auto_round.autoscheme.kept_scores import open_scores
from auto_round.autoscheme.parts import Part
from auto_round.autoscheme.runs import Given, choose_schemes
from auto_round.config import build_options
from auto_round.errors import ConfigError, NumericsError
from auto_round.pipeline.quantize import run
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.tuning.weights import round_to_nearest
from pipeline.runs import SHORT, token_rows
from pipeline.uneven import save_uneven_model

ROWS = token_rows(5, 16)
CLOSE = 2e-3
"""Largest relative difference of scores that sums in another order may make: float32 errors of 1e-6 of what
flows stand beside rounding errors of 1e-3 of it."""


def measure(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    monkeypatch.setenv("AR_CACHE", str(cache))
    wanted = {"scheme_options": "W2A16,W4A16,W8A16", "avg_bits": 4, "score_nsamples": 5, "score_seqlen": 16}
    options = build_options({**SHORT, "model": str(model), "output_dir": "unused", **wanted, **given})
    choose_schemes(options, given=Given(dataset=ROWS))


def largest_difference(one: dict[Part, list[float]], two: dict[Part, list[float]]) -> float:
    assert one.keys() == two.keys()
    pairs = [(a, b) for part in one for a, b in zip(one[part], two[part], strict=True)]
    return max(abs(a - b) / max(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", ["fisher", "kl", "first_order"])
def test_they_do_not_depend_on_the_batch_or_on_memory(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any, method: str
) -> None:
    measure(small(), tmp_path / "a", monkeypatch, score_method=method)
    measure(small(), tmp_path / "b", monkeypatch, score_method=method, score_batch_size=2)
    monkeypatch.setattr("auto_round.pipeline.fitting.choose.STREAMS_SHARE", 0)
    monkeypatch.setattr(by_divergence, "STREAM_BYTES", 0)
    monkeypatch.setattr(by_gradients, "CHANGES_BYTES", 0)
    measure(small(), tmp_path / "c", monkeypatch, score_method=method)
    assert largest_difference(seen[0], seen[1]) < CLOSE
    assert seen[0] == seen[2]
    for row in seen[0].values():
        assert row[0] > row[1] > row[2] > 0


@pytest.mark.parametrize("method", ["fisher", "kl", "first_order"])
def test_a_killed_measurement_goes_on_and_gives_the_same(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any, method: str
) -> None:
    measure(small(), tmp_path / "whole", monkeypatch, score_method=method)
    whole = scores.METHODS[method]

    class Killed(BaseException):
        pass

    def dies(*args: Any) -> Any:
        for number, found in enumerate(whole(*args)):
            if number == 6:
                raise Killed
            yield found

    monkeypatch.setattr(by_divergence, "STREAM_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(scores, "METHODS", {method: dies})
        with pytest.raises(Killed):
            measure(small(), tmp_path / "killed", patch, score_method=method)
    measure(small(), tmp_path / "killed", monkeypatch, score_method=method)
    assert seen[-1] == seen[0]
    assert not list((tmp_path / "killed").rglob("*.safetensors"))


def test_first_order_is_the_slope_of_the_loss_times_the_change(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any
) -> None:
    given = {"disable_opt_rtn": True, "iters": 0, "quant_lm_head": True, "scheme_options": "W4A16,BF16"}
    measure(small(), tmp_path, monkeypatch, score_method="first_order", avg_bits=8, **given)
    model = AutoModelForCausalLM.from_pretrained(small(), dtype=torch.float32)
    names = [name for part in seen[0] for name in part.layers]
    changes = {}
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        fmt = QuantizationScheme(bits=4, group_size=32).weight_format()
        assert fmt is not None
        q = round_to_nearest(weight.detach(), fmt, None, None)
        changes[name] = weight.detach() - q.format.dequantize(q)
        weight.data -= changes[name]
    sums = dict.fromkeys(names, 0.0)
    for row in torch.tensor(ROWS):
        losses = model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])
        weights = [model.get_parameter(f"{name}.weight") for name in names]
        slopes = torch.autograd.grad(-losses.sum() / (len(ROWS) * (len(row) - 1)), weights)
        for name, slope in zip(names, slopes, strict=True):
            sums[name] += float((slope * changes[name]).abs().sum())
    for part, (score, kept) in seen[0].items():
        assert score == pytest.approx(sum(sums[name] for name in part.layers), rel=1e-3)
        assert kept == 0


def test_fisher_is_the_square_of_the_slope_of_drawn_tokens_times_the_change(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any
) -> None:
    given = {"disable_opt_rtn": True, "iters": 0, "scheme_options": "W4A16,BF16", "score_batch_size": 3}
    measure(small(), tmp_path, monkeypatch, avg_bits=8, **given)
    model = AutoModelForCausalLM.from_pretrained(small(), dtype=torch.float32)
    fmt = QuantizationScheme(bits=4, group_size=32).weight_format()
    assert fmt is not None
    names = [name for part in seen[0] for name in part.layers]
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    changes = [fmt.dequantize(round_to_nearest(w.detach(), fmt, None, None)) - w.detach() for w in weights]
    sums = dict.fromkeys(names, 0.0)
    for first in range(0, len(ROWS), by_gradients.TOGETHER):
        drawn = torch.zeros(())
        for number in range(first, min(first + by_gradients.TOGETHER, len(ROWS))):
            likely = model(torch.tensor(ROWS[number : number + 1])).logits[0].log_softmax(-1)
            seeded = torch.Generator().manual_seed(42 + number)
            below = likely.detach().double().exp().cumsum(-1)
            uniform = torch.rand(len(likely), generator=seeded, dtype=torch.float64)
            tokens = torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)
            drawn = drawn + likely.gather(1, tokens).sum()
        for name, slope, change in zip(names, torch.autograd.grad(drawn, weights), changes, strict=True):
            sums[name] += float((slope * change).sum(1).square().sum())
    count = len(ROWS) * len(ROWS[0])
    for part, (score, kept) in seen[0].items():
        assert score == pytest.approx(sum(sums[name] for name in part.layers) / (2 * count), rel=1e-2)
        assert kept == 0


@pytest.mark.parametrize("options", ["W4A16,W8A16", "MXFP4,MXFP8"])
def test_both_ways_agree_where_errors_are_small(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any, options: str
) -> None:
    for method in ("fisher", "kl"):
        measure(small(), tmp_path, monkeypatch, score_method=method, scheme_options=options, avg_bits=6)
    for option in range(2):
        fisher, kl = (sum(row[option] for row in found.values()) for found in seen)
        assert 0.5 < fisher / kl < 2


def test_inputs_that_are_rounded_count(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any
) -> None:
    eight_bits = {"bits": 8, "group_size": 32, "data_type": "int", "act_group_size": -1}
    wanted = [{**eight_bits, "act_bits": bits, "act_dynamic": True} for bits in (4, 8)]
    measure(small(), tmp_path, monkeypatch, scheme_options=wanted, avg_bits=9, format="fake")
    for four, eight in seen[0].values():
        assert four > 20 * eight


@pytest.mark.parametrize("method", ["fisher", "kl", "first_order"])
def test_layers_that_no_prediction_depends_on_count_as_the_usual_one(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any, method: str, caplog: Any
) -> None:
    """Values of 0 in the first block: its attention gives 0, whatever becomes of its matrices."""
    silent = tmp_path / "model"
    shutil.copytree(small(), silent)
    tensors = load_file(silent / "model.safetensors")
    name = next(name for name in tensors if "layers.0." in name and "v_proj" in name)
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, silent / "model.safetensors", metadata={"format": "pt"})
    measure(silent, tmp_path / "cache", monkeypatch, score_method=method)
    measure(silent, tmp_path / "cache", monkeypatch, score_method=method)  # from what was kept
    assert seen[0] == seen[1]
    assert "no prediction on these rows depends on 4 layers (" in caplog.text
    sizes = {module: matrix.numel() for module, matrix in tensors.items()}
    rates = {
        part: [score / sum(sizes[f"{layer}.weight"] for layer in part.layers) for score in row]
        for part, row in seen[0].items()
    }
    usual = [part for part in rates if part.block == 0 and "self_attn" in part.layers[0]]
    others = [row for part, row in rates.items() if part not in usual]
    assert len(usual) == 2
    for part in usual:
        assert rates[part] == pytest.approx([median(column) for column in zip(*others, strict=True)])


def test_what_is_measured_is_smoothed_as_the_run_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any
) -> None:
    """So the predicted divergence is that of the run, within what second order and few rows allow."""
    model = save_uneven_model(tmp_path / "m")
    given = {**SHORT, "iters": 0, "model": str(model), "avg_bits": 5, "scheme_options": "MXFP8,MXFP4"}
    given |= {"disable_opt_rtn": False, "group_size": None, "score_nsamples": 5, "score_seqlen": 16}
    measured, predicted = {}, {}
    for smooth in (0, None):
        asked = build_options({**given, "smooth": smooth, "output_dir": str(tmp_path / str(smooth))})
        (options,) = choose_schemes(asked, given=Given(dataset=ROWS))
        result = run(options, dataset=ROWS)
        measured[smooth] = result.report["held_out"]["kl"]
        predicted[smooth] = result.report["auto_scheme"]["predicted_kl"]
    assert measured[None] < 0.6 * measured[0]
    for smooth in measured:
        assert 0.6 < predicted[smooth] / measured[smooth] < 1.6
    assert sum(row[1] for row in seen[1].values()) < 0.6 * sum(row[1] for row in seen[0].values())


def test_scores_of_a_model_smoothed_otherwise_are_not_taken(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any
) -> None:
    """With one strength, the factors of a channel differ where its readers round their inputs, too."""
    given = {"smooth": 0.25, "group_size": None, "avg_bits": 9}
    for options in ("MXFP4,W4A16", "W4A16,W8A16"):
        measure(small(), tmp_path / "one", monkeypatch, scheme_options=options, **given)
    measure(small(), tmp_path / "other", monkeypatch, scheme_options="W4A16,W8A16", **given)
    assert seen[1] == seen[2]
    assert len(list((tmp_path / "one").rglob("scores.jsonl"))) == 2


@pytest.mark.parametrize("method", ["fisher", "kl", "first_order"])
def test_what_is_not_finite_is_an_error(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for file in small().iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="sensitivity is nan"):
        measure(broken, tmp_path / "cache", monkeypatch, score_method=method)


def test_first_order_predicts_no_divergence() -> None:
    given = {"score_method": "first_order", "scheme_options": "W2A16,W4A16", "target_kl": 0.1}
    with pytest.raises(ConfigError, match="no divergences"):
        build_options({"model": "m", **given})


def test_a_folder_for_scores_that_cannot_be_made_is_said_with_its_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = r"file.scores, and it cannot be written .*AR_CACHE"
    with pytest.raises(ConfigError, match=said), open_scores(tmp_path / "file" / "scores", {}):
        pass
