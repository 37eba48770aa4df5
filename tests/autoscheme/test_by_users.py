"""AutoScheme as users ask for it: from Python, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from auto_round import AutoRound, AutoScheme, QuantizationScheme
from auto_round.cli.main import main
from auto_round.errors import CannotHoldError, ConfigError
from export.gguf.small_models import save_small_model
from pipeline.runs import token_rows

ROWS = [[token % 60 + 3 for token in row] for row in token_rows(6, 16)]
TOLD: dict[str, Any] = {"iters": 0, "nsamples": 2, "seqlen": 16, "dataset": ROWS, "device_map": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model("qwen3", tmp_path_factory.mktemp("model") / "tiny")


def wanted(**given: Any) -> AutoScheme:
    return AutoScheme(
        **{"avg_bits": 5.5, "options": ("W4A16", "W8A16"), "nsamples": 2, "seqlen": 16, **given}
    )


def test_quantize_returns_the_mixture_and_saves_it(model: Path, tmp_path: Path) -> None:
    ar = AutoRound(str(model), scheme=wanted(), **TOLD)
    quantized, schemes = ar.quantize()
    assert {scheme["bits"] for scheme in schemes.values()} == {4, 8}
    assert quantized is ar.model
    (folder,) = ar.save_quantized(tmp_path / "saved", format="auto_round")
    plan = json.loads((folder / "auto_scheme.json").read_text())
    assert plan["average_bits"] <= 5.5
    assert set(plan["layer_config"]) == set(schemes)


def test_quantize_takes_a_mixture_of_whole_and_floating_numbers(model: Path, tmp_path: Path) -> None:
    ar = AutoRound(str(model), scheme=wanted(avg_bits=7, options=("W4A16", "MXFP8")), **TOLD)
    _, schemes = ar.quantize()
    assert {fields["data_type"] for fields in schemes.values()} == {"int", "mx_fp"}
    (folder,) = ar.save_quantized(tmp_path / "saved")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["packing_format"]


def test_quantize_takes_a_mixture_that_the_usual_format_cannot_hold(model: Path) -> None:
    scheme = wanted(avg_bits=5, options=({"bits": 4, "group_size": 32}, {"bits": 5, "group_size": 32}))
    _, schemes = AutoRound(str(model), scheme=scheme, **TOLD).quantize()
    assert {fields["bits"] for fields in schemes.values()} == {4, 5}
    with pytest.raises(CannotHoldError, match="auto_round"):
        AutoRound(str(model), scheme=scheme, **TOLD).quantize_and_save()
    with pytest.raises(CannotHoldError, match="auto_round"):
        AutoRound(str(model), scheme=scheme, format="auto_round", **TOLD).quantize()


def test_each_target_gets_a_folder(model: Path, tmp_path: Path) -> None:
    ar = AutoRound(str(model), scheme=wanted(avg_bits=[5, 7], dataset=ROWS), **TOLD)
    _, folders = ar.quantize_and_save(tmp_path, load=False)
    assert [folder.name for folder in folders] == ["5bits", "7bits"]
    with pytest.raises(ConfigError, match="2 targets"):
        ar.quantize()


def test_options_may_be_objects_and_methods_have_names(model: Path) -> None:
    options = [QuantizationScheme(bits=4, group_size=32), {"bits": 8, "group_size": 32}, "BF16"]
    _, schemes = AutoRound(
        str(model), scheme=wanted(options=options, avg_bits=9, method="DeltaLoss"), **TOLD
    ).quantize()
    assert all(scheme["group_size"] == 32 for scheme in schemes.values())
    with pytest.raises(ConfigError, match="method"):
        AutoRound(str(model), scheme=wanted(method="hessian"), **TOLD)
    with pytest.raises(ConfigError, match="target"):
        AutoRound(str(model), scheme=AutoScheme(options="W4A16,W8A16"), **TOLD)


def test_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"text": "some words of a text " * 20}) for _ in range(4)))
    words = [
        str(model),
        "--target-bits",
        "5,6",
        "--options",
        "W4A16,W8A16",
        "--iters",
        "0",
        "--device",
        "cpu",
    ]
    words += [
        "--score_nsamples",
        "2",
        "--score_seqlen",
        "16",
        "--dataset",
        str(text),
        "--ignore-scale-zp-bits",
    ]
    words += [
        "--shared_layers",
        "o_proj",
        "v_proj",
        "--disable_opt_rtn",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--dry-run"]) == 0
    assert "chosen:  5 bits: 4." in capsys.readouterr().out
    assert main(words) == 0
    plans = sorted(tmp_path.glob("out/*/*/auto_scheme.json"))
    assert [plan.parent.name for plan in plans] == ["5bits", "6bits"]
    assert [
        json.loads(plan.read_text())["average_bits"] <= bits for plan, bits in zip(plans, (5, 6), strict=True)
    ]
    assert main([str(model), "--avg_bits", "3"]) == 2
    assert main([*words, "--target_size", "1GB"]) == 2
    assert main([*words[:1], "--avg_bits", "2", *words[3:]]) == 2
    assert "4.000 to 8.000 bits per weight" in capsys.readouterr().err
