"""Floating formats, from tuning to folders: compressed-tensors predicts what was tuned."""

from __future__ import annotations

import json

import pytest
import torch

from auto_round.errors import UnsupportedError
from pipeline.runs import kl_of, quantize, weights

LIBRARY = "compressed_tensors"
FP8_TOKEN = {"bits": 8, "data_type": "fp", "act_bits": 8, "act_data_type": "fp", "act_group_size": -1}

CASES = {
    "MXFP4": ({"scheme": "MXFP4"}, "mxfp4-pack-quantized"),
    "MXFP6": ({"scheme": "MXFP6"}, "mxfp6-pack-quantized"),
    "MXFP8": ({"scheme": "MXFP8"}, "mxfp8-quantized"),
    "MXFP4A16": ({"scheme": "MXFP4", "act_bits": 16}, "mxfp4-pack-quantized"),
    "NVFP4A16": ({"data_type": "nv_fp4", "group_size": 16}, "nvfp4-pack-quantized"),
    "FPW8A16": ({"scheme": "FPW8A16"}, "float-quantized"),
    "FP8 by token": ({**FP8_TOKEN, "group_size": -1}, "float-quantized"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_library_predicts_what_was_tuned(tiny, tmp_path, name):
    pytest.importorskip(LIBRARY)
    given, order = CASES[name]
    result = quantize(tiny("llama"), tmp_path / "out", format="llm_compressor", **given)
    # Coarse activations: a difference of one bit before the border of two codes is a whole step.
    assert kl_of(result)["llm_compressor"] < (1e-2 if "act_bits" in given or name.startswith("FP8") else 1e-3)
    config = json.loads((result.folders[0] / "quantization_config.json").read_text())
    assert config["format"] == order
    (group,) = config["config_groups"].values()
    assert group["weights"]["type"] == "float"


ODD = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 48}


def test_blocks_may_be_short(tiny, tmp_path):
    pytest.importorskip(LIBRARY)
    given = {"scheme": "FP8_BLOCK", "group_size": None, "act_bits": 16}
    result = quantize(tiny("llama", **ODD), tmp_path / "out", format="llm_compressor,fake", **given)
    assert max(kl_of(result).values()) < 1e-6
    stored = weights(result.folders[0])
    assert stored["model.layers.0.mlp.down_proj.weight"].shape == (96, 160)
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (1, 2)
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].shape == (2, 1)
    reasons = result.report["engines"]["llm_compressor"]["vLLM"]["reasons"]
    assert any("blocks of 128 inputs, which do not divide" in reason for reason in reasons), reasons


def test_groups_of_inputs_may_not_be_short(tiny, tmp_path):
    with pytest.raises(UnsupportedError, match="128 does not divide 96 inputs") as caught:
        quantize(tiny("llama", **ODD), tmp_path / "out", scheme="FP8_BLOCK", group_size=None)
    text = str(caught.value)
    assert "q_proj" in text
    assert "--act_bits 16" in text
    assert "--ignore_layers" in text


def test_scales_are_the_bytes_that_readers_expect(tiny, tmp_path):
    pytest.importorskip(LIBRARY)
    result = quantize(tiny("llama"), tmp_path / "out", format="llm_compressor", scheme="MXFP4", iters=0)
    stored = weights(result.folders[0])
    for name in result.plan.quantized:
        assert stored[f"{name}.weight_packed"].dtype is torch.uint8
        assert stored[f"{name}.weight_scale"].dtype is torch.uint8


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8"])
def test_models_in_other_dtypes_are_refused_before_work(tiny, tmp_path, scheme):
    model = tiny("llama", dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        quantize(model, tmp_path / "out", format="llm_compressor", scheme=scheme)


def test_numbers_without_words_are_refused_before_work(tiny, tmp_path):
    with pytest.raises(UnsupportedError, match="mx_int"):
        quantize(tiny("llama"), tmp_path / "out", format="llm_compressor", scheme="MXINT4")
