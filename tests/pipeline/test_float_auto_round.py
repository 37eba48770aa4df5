"""Floating formats in `auto_round` folders: this package loads them, packed, and rounds what flows in."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.consumers.inventory import take_inventory
from auto_round.errors import UnsupportedError
from auto_round.inference.qlinear import QuantLinear
from pipeline.runs import kl_of, quantize, weights

FP8_TOKEN = {"bits": 8, "data_type": "fp", "act_bits": 8, "act_data_type": "fp", "act_group_size": -1}

SOURCE_OF_AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:llm_compressor",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "mx_fp",
    "iters": 0,
    "model_free": True,
    "block_name_to_quantize": "model.layers",
    "act_bits": 4,
    "act_data_type": "mx_fp",
    "act_dynamic": True,
    "act_group_size": 32,
    "act_sym": True,
    "extra_config": {"lm_head": {"bits": 16, "data_type": "float", "act_bits": 16, "act_data_type": "float"}},
}
"""Configuration of a folder of auto-round 0.16.1 (MXFP4, `iters 0`)."""

WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Sizes that blocks of 128 divide."""

CASES = {
    "MXFP4": {"scheme": "MXFP4"},
    "MXFP4_RCEIL": {"scheme": "MXFP4_RCEIL"},
    "MXFP6": {"scheme": "MXFP6"},
    "MXFP8": {"scheme": "MXFP8"},
    "MXFP4A16": {"scheme": "MXFP4", "act_bits": 16},
    "MXFP4A8": {"scheme": "MXFP4", "act_bits": 8},
    "NVFP4A16": {"data_type": "nv_fp4", "group_size": 16},
    "FP8 by token": {**FP8_TOKEN, "group_size": -1},
    "FP8A16 by row": {"bits": 8, "data_type": "fp", "group_size": -1},
    "FP8 in groups": {"bits": 8, "data_type": "fp", "group_size": 32},
}


@pytest.mark.parametrize("name", CASES)
def test_it_predicts_what_was_tuned(tiny, tmp_path, name):
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", **CASES[name])
    assert kl_of(result)["auto_round"] < 1e-9
    config = json.loads((result.folders[0] / "config.json").read_text())["quantization_config"]
    assert config["packing_format"] == "auto_round:llm_compressor"
    assert ("act_bits" in config) == ("A16" not in name and "groups" not in name)


@pytest.mark.parametrize("name", ["MXFP4A16", "MXFP8A16"])
def test_experts(tiny, tmp_path, name):
    sizes = {"moe_intermediate_size": 64, "num_experts": 2, "num_experts_per_tok": 1}
    given = {"scheme": name.removesuffix("A16"), "act_bits": 16, "iters": 0}
    result = quantize(tiny("qwen3_moe", **sizes), tmp_path / "out", format="auto_round", **given)
    assert any(".experts." in name for name in result.plan.quantized)
    assert kl_of(result)["auto_round"] < 1e-9


def test_words_of_auto_round_0_16(tiny, tmp_path):
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", scheme="MXFP4", iters=0)
    folder = result.folders[0]
    config = json.loads((folder / "config.json").read_text())
    ids = torch.arange(3, 20)[None]
    want = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    config["quantization_config"] = SOURCE_OF_AUTO_ROUND
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantization_config.json").write_text(json.dumps(SOURCE_OF_AUTO_ROUND))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(ids).logits, want)
    verdicts = {v.engine: v for v in take_inventory(folder).verdicts}
    assert verdicts["Transformers"].loads
    assert verdicts["vLLM"].loads
    assert "data_type 'mx_fp'" in verdicts["SGLang"].text
    assert take_inventory(folder).schemes.keys() == {"MXFP4"}


@pytest.mark.parametrize(("scheme", "bits"), [("MXFP4", 4.25), ("MXFP8", 8.25)])
def test_packed_in_memory_and_saved_again(tiny, tmp_path, scheme, bits):
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", scheme=scheme, iters=0)
    model = AutoModelForCausalLM.from_pretrained(result.folders[0])
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == len(result.plan.quantized)
    held = sum(8 * b.nbytes for layer in layers for b in layer.buffers())
    assert held == bits * sum(layer.in_features * layer.out_features for layer in layers)
    model.save_pretrained(tmp_path / "again")
    first, again = weights(result.folders[0]), weights(tmp_path / "again")
    for name in result.plan.quantized:
        for suffix in ("weight_scale", "weight" if scheme == "MXFP8" else "weight_packed"):
            stored, saved = first[f"{name}.{suffix}"], again[f"{name}.{suffix}"]
            assert torch.equal(stored.view(torch.uint8), saved.view(torch.uint8))


def test_mixed_floats(tiny, tmp_path):
    rules = {"down_proj": {"bits": 8}, "o_proj": {"act_bits": 16}}
    given = {"scheme": "MXFP4", "layer_config": rules, "iters": 0, "ignore_layers": "layers.0.mlp.gate_proj"}
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", **given)
    assert kl_of(result)["auto_round"] < 1e-9


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"scheme": "FPW8A16", "group_size": 0}, "one scale for a whole tensor"),
        ({"scheme": "FP8_BLOCK", "group_size": 128, "act_bits": 16}, "blocks of several rows"),
        ({"scheme": "MXINT4"}, "mxint4|mx_int|zero point|scale"),
        (
            {"scheme": "W4A16", "act_bits": 8, "act_data_type": "fp", "act_group_size": -1},
            "whole numbers alone",
        ),
        ({"scheme": "MXFP4", "layer_config": {"down_proj": {"data_type": "int"}}}, "floating numbers"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_work(tiny, tmp_path, given, reason):
    with pytest.raises(UnsupportedError, match=reason):
        quantize(tiny("llama", **WIDE), tmp_path / "out", format="auto_round", **given)
