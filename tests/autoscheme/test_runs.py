"""From a budget to folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound, AutoScheme
from auto_round.autoscheme import runs
from auto_round.autoscheme.runs import Given, choose_schemes
from auto_round.config import Options, build_options
from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.log import logger
from auto_round.models.folder import FolderSource
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.machine import device
from auto_round.pipeline.quantize import run
from auto_round.pipeline.result import Result
from pipeline.runs import SHORT, token_rows

ROWS = token_rows(4, 16)
PLAIN = {**SHORT, "iters": 0, "disable_opt_rtn": True, "score_nsamples": 3, "score_seqlen": 16}
SCHEMES = "W2A16,W4A16,W8A16"


def asked(model: Path, out: Path, **given: Any) -> Options:
    wanted = {"scheme_options": SCHEMES, "avg_bits": 4} | given
    return build_options({**PLAIN, "model": str(model), "output_dir": str(out), **wanted})


def chosen(model: Path, out: Path, **given: Any) -> tuple[Options, ...]:
    return choose_schemes(asked(model, out, **given), given=Given(dataset=ROWS))


def average(model: Path, result: Result) -> float:
    """Bits of codes and scales per quantized weight."""
    with FolderSource.open(model) as source:
        return result.plan.measure(source.layers).bits_per_weight


def bits(options: Options) -> dict[str, str]:
    assert options.chosen is not None
    return dict(options.chosen["layer_config"])


@pytest.mark.parametrize("method", ["fisher", "kl", "first_order"])
def test_a_budget_becomes_a_folder_that_reloads(small: Any, tmp_path: Path, method: str) -> None:
    (options,) = chosen(small(), tmp_path / "out", score_method=method)
    result = run(options, dataset=ROWS)
    assert 3.5 < average(small(), result) <= 4
    assert result.report["auto_scheme"]["average_bits"] == pytest.approx(average(small(), result), abs=1e-4)
    assert result.report["auto_scheme"]["gap"] == 0
    assert result.report["verified"]["auto_round"]["kl"] < 1e-4
    measured = result.report["sensitivity"]["layers"]
    assert {layer["block"] for layer in measured} == {0, 1}
    assert "self_attn.q_proj+k_proj+v_proj" in {layer["kind"] for layer in measured}
    assert all(score >= 0 for layer in measured for score in layer["scores"].values())
    plan = json.loads((tmp_path / "out" / "auto_scheme.json").read_text())
    assert set(plan["layer_config"]) == set(result.plan.quantized)


def test_the_plan_can_be_given_back(small: Any, tmp_path: Path) -> None:
    (options,) = chosen(small(), tmp_path / "out")
    result = run(options, dataset=ROWS)
    again = build_options(
        {**PLAIN, "model": str(small()), "output_dir": str(tmp_path / "again")}
        | {"layer_config": str(tmp_path / "out" / "auto_scheme.json")}
    )
    second = run(again, dataset=ROWS)
    assert {n: e.scheme for n, e in second.plan.entries.items()} == {
        n: e.scheme for n, e in result.plan.entries.items()
    }


def test_several_targets_share_the_scores(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chosen(small(), tmp_path / "out", avg_bits="3.5,4,6")
    assert [Path(o.output.output_dir).name for o in found] == ["3.5bits", "4bits", "6bits"]
    losses = [o.chosen["predicted_kl"] for o in found if o.chosen]
    assert losses[0] > losses[1] > losses[2] > 0
    from auto_round.autoscheme import scores

    monkeypatch.setattr(scores, "METHODS", {})
    (again,) = chosen(small(), tmp_path / "other", avg_bits=6)
    assert bits(again) == bits(found[2])


def test_q_k_v_share_and_rules_stay(small: Any, tmp_path: Path) -> None:
    rules = {"down_proj": "W8A16", "model.layers.1.self_attn.o_proj": {"bits": 16}}
    (options,) = chosen(
        small(), tmp_path / "out", avg_bits=5.5, layer_config=rules, shared_layers=[["o_proj", "v_proj"]]
    )
    found = bits(options)
    for block in range(2):
        parts = [found[f"model.layers.{block}.self_attn.{x}_proj"] for x in "qkv"]
        assert all(part == parts[0] for part in parts)
        assert found[f"model.layers.{block}.mlp.gate_proj"] == found[f"model.layers.{block}.mlp.up_proj"]
        assert found[f"model.layers.{block}.mlp.down_proj"]["bits"] == 8
    assert found["model.layers.0.self_attn.o_proj"] == found["model.layers.0.self_attn.v_proj"]
    assert "model.layers.1.self_attn.o_proj" not in found
    result = run(options, dataset=ROWS)
    assert result.plan.scheme_of("model.layers.1.self_attn.o_proj") is None
    reasons = {(line["kind"], *line["blocks"][0]): line["reason"] for line in result.report["plan"][:-1]}
    assert reasons.pop(("mlp.down_proj", 0, 1)) == 'layer_config "down_proj"'
    assert reasons.pop(("self_attn.o_proj", 1, 1)) == "layer_config"  # one layer, by its whole name
    assert set(reasons.values()) == {"AutoScheme"}
    labels = {line["scheme"] for line in result.report["plan"] if line["bits"] < 16}
    assert result.report["scheme"] == f"AutoScheme: {', '.join(sorted(labels))}"
    title = next(
        line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line[:2] == "# "
    )
    assert title.endswith(result.report["scheme"])
    assert average(small(), result) <= 5.5


def test_each_layer_has_a_scheme_of_its_own_where_asked(small: Any, tmp_path: Path) -> None:
    (together,) = chosen(small(), tmp_path / "out", avg_bits=5.3)
    (apart,) = chosen(small(), tmp_path / "out", avg_bits=5.3, shared_layers=[["none"]])
    assert together.chosen is not None
    assert apart.chosen is not None
    assert apart.chosen["predicted_kl"] < together.chosen["predicted_kl"]
    schemes = bits(apart)
    names = ("q_proj", "k_proj", "v_proj")
    assert any(len({str(schemes[f"model.layers.{b}.self_attn.{n}"]) for n in names}) > 1 for b in range(2))
    assert run(apart, dataset=ROWS).report["verified"]["auto_round"]["kl"] < 1e-4


def test_a_layer_may_be_kept(small: Any, tmp_path: Path) -> None:
    (options,) = chosen(small(), tmp_path / "out", scheme_options=["W4A16", "BF16"], avg_bits=10)
    kept = [name for name, scheme in bits(options).items() if scheme == "BF16"]
    assert kept
    result = run(options, dataset=ROWS)
    assert set(result.plan.quantized) == set(bits(options)) - set(kept)


def test_the_head_takes_part_where_it_is_quantized(small: Any, tmp_path: Path) -> None:
    model = small(tie_word_embeddings=False)
    (options,) = chosen(model, tmp_path / "out", quant_lm_head=True, avg_bits=5)
    assert "lm_head" in bits(options)
    assert run(options, dataset=ROWS).plan.scheme_of("lm_head") is not None


@pytest.mark.parametrize("kept", [{}, {"model_dtype": "float32"}], ids=["own dtype", "float32"])
def test_a_size_of_the_files_is_met(small: Any, tmp_path: Path, kept: dict[str, Any]) -> None:
    (full,) = chosen(small(), tmp_path / "full", avg_bits=16, **kept)
    (least,) = chosen(small(), tmp_path / "least", avg_bits=3.2, **kept)
    sizes = [run(o, dataset=ROWS).report["bytes_after"]["auto_round"] for o in (full, least)]
    wanted = sum(sizes) // 2
    (options,) = chosen(small(), tmp_path / "out", avg_bits=None, target_size=wanted, **kept)
    files = sum(f.stat().st_size for f in (tmp_path / "full").glob("*.safetensors"))
    assert files == sizes[0]
    reached = run(options, dataset=ROWS).report["bytes_after"]["auto_round"]
    assert 0.9 * wanted < reached <= wanted


def test_a_predicted_divergence_is_met(small: Any, tmp_path: Path) -> None:
    (most,) = chosen(small(), tmp_path / "a", avg_bits=4)
    assert most.chosen is not None
    (options,) = chosen(small(), tmp_path / "b", avg_bits=None, target_kl=most.chosen["predicted_kl"])
    assert options.chosen is not None
    assert options.chosen["predicted_kl"] <= most.chosen["predicted_kl"]
    assert options.chosen["average_bits"] <= most.chosen["average_bits"]


def test_what_cannot_be_reached_is_refused_with_what_can(small: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 bits cannot be reached .* 2\.\d+ to 8\.\d+ bits per weight"):
        chosen(small(), tmp_path / "out", avg_bits=2)
    with pytest.raises(ConfigError, match=r"cannot be reached .* MB"):
        chosen(small(), tmp_path / "out", avg_bits=None, target_size="1KB")


def test_outputs_that_cannot_go_there_are_refused_before_anything_is_measured(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "measured_scores", lambda *_: pytest.fail("measured"))
    for folder, given in (("one", {}), ("several/4bits", {"avg_bits": "3,4"})):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "thesis.txt").write_text("years of work")
        with pytest.raises(ConfigError, match=r"already holds 1 files .*thesis.txt.*choose another"):
            chosen(small(), tmp_path / folder.partition("/")[0], **given)
    scheme = AutoScheme(avg_bits=(3, 4), options=SCHEMES.split(","))
    with pytest.raises(ConfigError, match="makes one model, and 2 targets are given"):
        AutoRound(small(), scheme=scheme, dataset=ROWS).quantize()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"distill_steps takes rows .* expected 2 \+ 2 held out \+ 1 more, and the data give 4"),
        ({"device_map": {"up_proj": "cpu", "": "meta:0"}}, "distill_steps runs on one device"),
    ],
)
def test_what_all_blocks_cannot_be_tuned_on_is_refused_before_anything_is_measured(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(runs, "measured_scores", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(device, "_device", torch.device)  # as if one more were there
    with pytest.raises(ConfigError, match=said):
        chosen(small(), tmp_path / "out", nsamples=2, distill_steps=1, distill_nsamples=1, **given)


def test_rows_of_all_blocks_are_looked_at_in_silence(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run itself says what there is to say: it was said twice."""
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.INFO)
    given = {"nsamples": 2, "distill_steps": 2, "iters": 1, "seqlen": 1 << 20, "score_seqlen": 16}
    rows, model = token_rows(10, 256), small(max_position_embeddings=256)
    (options,) = choose_schemes(asked(model, tmp_path / "out", **given), given=Given(dataset=rows))
    assert not [said for said in caplog.messages if "rows" in said]
    caplog.clear()
    prepare(options, dataset=rows)
    for said in (
        "longer than the model's context",
        "10 of 12 calibration rows",
        "see each of 6 rows 1.3 times",
    ):
        assert len([message for message in caplog.messages if said in message]) == 1


def test_one_option_has_one_size(small: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"these layers take \d\.\d+ bits per weight; give a larger"):
        chosen(small(), tmp_path / "out", avg_bits=3, scheme_options="W4A16")


def test_rules_that_leave_no_layer_say_what_to_leave_out(small: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no layer to choose .* leave out the budget"):
        chosen(small(), tmp_path / "out", layer_config={"proj": "W8A16"})


def test_a_model_that_cannot_be_measured_says_so_beside_the_formats_reasons(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain rounding runs no block, but measuring does: another format alone does not help."""

    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedError("no", [Refusal("model", "its blocks do not run one by one", "")])

    monkeypatch.setattr(FolderSource, "refuse_untraceable", refuse)
    monkeypatch.setattr("auto_round.autoscheme.runs.refuse_unmeasurable", lambda *_: None)
    with pytest.raises(UnsupportedError, match="auto_awq") as caught:
        chosen(small(), tmp_path / "out", format="auto_awq")
    assert "its blocks do not run one by one" in str(caught.value)


def test_a_divergence_that_none_has_is_refused_in_words(small: Any, tmp_path: Path) -> None:
    for kl in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r'"target_kl" cannot be .*: expected '):
            asked(small(), tmp_path / "out", avg_bits=None, target_kl=kl)
    with pytest.raises(
        ConfigError, match=r"target_kl: 1e-09 nats .* predicted for them is \S+ nats per token"
    ):
        chosen(small(), tmp_path / "out", avg_bits=None, target_kl=1e-9)


def test_a_budget_that_leaves_nothing_to_choose_is_said(
    small: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen(small(), tmp_path / "out", avg_bits=9)
    assert "9 bits leave nothing to choose" in caplog.text


def test_options_that_share_no_format_are_refused_before_work(small: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="types of GGUF files"):
        chosen(small(), tmp_path / "out", scheme_options="GGUF:Q4_0,W4A16")
    with pytest.raises((UnsupportedError, ConfigError), match="auto_awq"):
        chosen(small(), tmp_path / "out", format="auto_awq", sym=False)
    with pytest.raises(ConfigError, match="unknown scheme"):
        chosen(small(), tmp_path / "out", scheme_options="W4A16,W9A16")
    with pytest.raises(ConfigError, match="bits: the options of AutoScheme differ"):
        chosen(small(), tmp_path / "out", bits=4)
    with pytest.raises(ConfigError, match="plan of its own"):
        chosen(small(), tmp_path / "out", format="auto_round,gguf:q4_0")


@pytest.mark.parametrize(
    "given",
    [
        {"avg_bits": 4, "scheme_options": ()},
        {"avg_bits": None, "scheme_options": SCHEMES},
        {"avg_bits": 4, "target_size": "1GB"},
        {"avg_bits": "four"},
        {"avg_bits": 0},
        {"avg_bits": -1},
        {"score_method": "guess"},
    ],
)
def test_requests_that_say_too_little_or_too_much(small: Any, tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        asked(small(), tmp_path / "out", **given)
