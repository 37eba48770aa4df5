"""Whole and floating numbers in one folder: every format that holds both is read back as it was tuned."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.consumers.engines import SGLANG, VLLM
from auto_round.consumers.ours import TRANSFORMERS
from auto_round.consumers.verdict import judge_folder
from auto_round.errors import CannotHoldError
from auto_round.inference.qlinear import QuantLinear
from pipeline.runs import kl_of, quantize

ONE_PACKING = "it reads one packing_format for a folder, and layers here name another one"

ROUNDED = {"iters": 0, "disable_opt_rtn": True}

MIXTURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "MXFP8 in W4": (
        {"scheme": "W4A16", "layer_config": {"mlp": "MXFP8"}},
        "auto_round:auto_gptq",
        "auto_round:llm_compressor",
    ),
    "W8 in MXFP4": (
        {"scheme": "MXFP4", "layer_config": {"down_proj": "W8A16"}},
        "auto_round:llm_compressor",
        "auto_round:auto_gptq",
    ),
    "zero points in MXFP4": (
        {
            "scheme": "MXFP4",
            "layer_config": {"down_proj": {"bits": 4, "data_type": "int", "sym": False, "act_bits": 16}},
        },
        "auto_round:llm_compressor",
        "auto_round",
    ),
    "W4 in NVFP4, calibrated": (
        {"scheme": "NVFP4", "group_size": None, "layer_config": {"o_proj": "W4A16"}},
        "auto_round:llm_compressor",
        "auto_round:auto_gptq",
    ),
    "W4 in FP8, calibrated": (
        {"scheme": "FP8_STATIC", "group_size": None, "layer_config": {"mlp": "W4A16"}},
        "auto_round:fp8_static",
        "auto_round:auto_gptq",
    ),
    "FP8 in W4": (
        {"scheme": "W4A16", "layer_config": {"down_proj": "FPW8A16"}},
        "auto_round:auto_gptq",
        "auto_round:fp8",
    ),
}
"""Name -> options, packing at the top, packing of the other kind of numbers."""


def config_of(folder: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_auto_round_holds_both_kinds_of_numbers(tiny, tmp_path, name):
    given, top, other = MIXTURES[name]
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", **ROUNDED, **given)
    assert kl_of(result)["auto_round"] < 1e-9
    config = config_of(result.folders[0])
    assert config["packing_format"] == top
    assert {said.get("packing_format") for said in config["extra_config"].values()} <= {None, other}
    assert any("packing_format" in said for said in config["extra_config"].values())
    verdicts = {verdict.engine: verdict for verdict in judge_folder(result.folders[0])}
    assert verdicts[TRANSFORMERS].loads, verdicts[TRANSFORMERS].text
    assert [verdicts[name].reasons for name in (VLLM, SGLANG)] == [(ONE_PACKING,)] * 2


def test_experts_of_one_kind_beside_layers_of_another(tiny, tmp_path):
    model = tiny("qwen3_moe", moe_intermediate_size=32)
    given = {
        "scheme": "W4A16",
        "layer_config": {"self_attn": {"bits": 8, "data_type": "mx_fp", "group_size": 32}},
    }
    result = quantize(model, tmp_path / "out", format="auto_round", **ROUNDED, **given)
    assert kl_of(result)["auto_round"] < 1e-6
    loaded = AutoModelForCausalLM.from_pretrained(result.folders[0], dtype="auto")
    kinds = {type(m.spec.fmt.grid).__name__ for m in loaded.modules() if isinstance(m, QuantLinear)}
    assert "FloatGrid" in kinds


def test_a_packing_that_was_named_holds_one_kind(tiny, tmp_path):
    given = {"scheme": "W4A16", "layer_config": {"mlp": "MXFP8"}}
    with pytest.raises(CannotHoldError, match="formats that can: auto_round, llm_compressor"):
        quantize(tiny("llama"), tmp_path / "out", format="auto_round:auto_gptq", **ROUNDED, **given)


def test_the_user_hears_who_reads_both(tiny, tmp_path, caplog):
    given = {"scheme": "W4A16", "layer_config": {"mlp": "MXFP8"}, "verify": False}
    quantize(tiny("llama"), tmp_path / "out", format="auto_round", **ROUNDED, **given)
    assert "not by vLLM and SGLang; for those use the format llm_compressor" in caplog.text


def test_loaded_layers_round_only_the_inputs_that_they_should(tiny, tmp_path):
    given = {"scheme": "MXFP4", "layer_config": {"down_proj": "W8A16"}}
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", **ROUNDED, **given)
    model = AutoModelForCausalLM.from_pretrained(result.folders[0], dtype=torch.float32)
    layers = {name: m.spec.inputs for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {name.rpartition(".")[2] for name, inputs in layers.items() if inputs is None} == {"down_proj"}
    assert len(layers) == 14
