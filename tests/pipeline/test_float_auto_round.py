"""Floating formats in `auto_round` folders: this package loads them, packed, and rounds what flows in."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
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

ROUNDED = {"group_size": None, "iters": 0, "disable_opt_rtn": True, "verify": False}

INT8_STATIC = {"scheme": "INT8_W8A8", "group_size": None, "act_dynamic": False, "act_group_size": 0}

CASES = {
    "MXFP4": {"scheme": "MXFP4"},
    "MXFP4_RCEIL": {"scheme": "MXFP4_RCEIL"},
    "MXFP6": {"scheme": "MXFP6"},
    "MXFP8": {"scheme": "MXFP8"},
    "MXFP4A16": {"scheme": "MXFP4", "act_bits": 16},
    "MXFP4A8": {"scheme": "MXFP4", "act_bits": 8},
    "NVFP4": {"scheme": "NVFP4", "group_size": None},
    "FP8_STATIC": {"scheme": "FP8_STATIC", "group_size": None},
    "FPW8A16": {"scheme": "FPW8A16", "group_size": None},
    "FP8 with one scale, static": {"scheme": "FP8_STATIC", "group_size": 0},
    "FP8 in groups, static": {**FP8_TOKEN, "group_size": 32, "act_group_size": 0, "act_dynamic": False},
    "NVFP4A16": {"data_type": "nv_fp4", "group_size": 16},
    "FP8 by token": {**FP8_TOKEN, "group_size": -1},
    "FP8A16 by row": {"bits": 8, "data_type": "fp", "group_size": -1},
    "FP8 in groups": {"bits": 8, "data_type": "fp", "group_size": 32},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK", "group_size": None},
    "FP8_BLOCK A16": {"scheme": "FP8_BLOCK", "group_size": None, "act_bits": 16},
    "INT8_W8A8": {"scheme": "INT8_W8A8", "group_size": None},
    "INT8, static": INT8_STATIC,
    "W4 beside INT8": {
        "scheme": "INT8_W8A8",
        "group_size": None,
        "layer_config": {"down_proj": "W4A16", "o_proj": "FP8_BLOCK"},
    },
}


PACKINGS = {
    "FP8_STATIC": "auto_round:fp8_static",
    "FP8 with one scale, static": "auto_round:fp8_static",
    "FPW8A16": "auto_round:fp8",
}
"""Orders of bytes that are not `auto_round:llm_compressor`."""


@pytest.mark.parametrize("name", CASES)
def test_it_predicts_what_was_tuned(tiny, tmp_path, name):
    sizes = WIDE if "BLOCK" in name or name == "W4 beside INT8" else {}
    result = quantize(tiny("llama", **sizes), tmp_path / "out", format="auto_round", **CASES[name])
    assert kl_of(result)["auto_round"] < 1e-9
    config = json.loads((result.folders[0] / "config.json").read_text())["quantization_config"]
    assert config["packing_format"] == PACKINGS.get(name, "auto_round:llm_compressor")
    assert ("activation_scheme" in config) == (name in PACKINGS)
    assert config["group_size"] != 0  # Transformers does not load it from the top
    assert ("act_bits" in config) == ("A16" not in name and name != "FP8 in groups")


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


@pytest.mark.parametrize(
    ("scheme", "bits"), [("MXFP4", 4.25), ("MXFP8", 8.25), ("NVFP4", 4.5), ("FP8_STATIC", 8)]
)
def test_packed_in_memory_and_saved_again(tiny, tmp_path, scheme, bits):
    given = {"scheme": scheme, "group_size": None, "iters": 0}
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", **given)
    model = AutoModelForCausalLM.from_pretrained(result.folders[0])
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == len(result.plan.quantized)
    held = sum(8 * b.nbytes for layer in layers for b in layer.buffers())
    weights_held = bits * sum(layer.in_features * layer.out_features for layer in layers)
    singles = 16 * sum(layer.out_features for layer in layers) if scheme == "FP8_STATIC" else 0
    assert 0 <= held - weights_held - singles <= 64 * len(layers)  # numbers of a whole tensor
    model.save_pretrained(tmp_path / "again")
    first, again = weights(result.folders[0]), weights(tmp_path / "again")
    packed = [name for name in first if name.rpartition(".")[0] in result.plan.quantized]
    assert len(packed) == len(layers) * {"NVFP4": 4, "FP8_STATIC": 3}.get(scheme, 2)
    for name in packed:
        stored, saved = first[name], again[name]
        if name.endswith("input_scale"):
            assert torch.equal(stored.float(), saved)
        else:
            assert torch.equal(stored.view(torch.uint8), saved.view(torch.uint8))


FP8_OF_AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:fp8_static",
    "fmt": "e4m3",
    "activation_scheme": "static",
    "bits": 8,
    "group_size": -1,
    "sym": True,
    "data_type": "fp",
    "act_bits": 8,
    "act_data_type": "fp",
    "act_dynamic": False,
    "act_group_size": 0,
    "act_sym": True,
    "block_name_to_quantize": "model.layers",
}
"""Configuration of a folder of auto-round 0.16.1 (FP8_STATIC); it does not say how its scales are stored."""


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_static_of_auto_round_0_16(tiny, tmp_path, stored):
    """Scales in the dtype of the model, or in float32 where it was tuned on a CPU."""
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", scheme="FP8_STATIC", **ROUNDED)
    folder = result.folders[0]
    ids = torch.arange(3, 20)[None]
    want = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    tensors = {n: t.to(stored) if n.endswith("_scale") else t for n, t in weights(folder).items()}
    name = result.plan.quantized[0]
    assert (tensors[f"{name}.weight_scale"].dim(), tensors[f"{name}.input_scale"].shape) == (1, (1,))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FP8_OF_AUTO_ROUND
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantization_config.json").write_text(json.dumps(FP8_OF_AUTO_ROUND))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, want)
    verdicts = {v.engine: v for v in take_inventory(folder).verdicts}
    assert verdicts["Transformers"].loads
    assert not verdicts["vLLM"].loads


def test_other_fp8_numbers_are_refused(tiny, tmp_path):
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", scheme="FP8_STATIC", **ROUNDED)
    config = json.loads((result.folders[0] / "config.json").read_text())
    config["quantization_config"]["fmt"] = "e5m2"
    (result.folders[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="e5m2"):
        AutoModelForCausalLM.from_pretrained(result.folders[0])


def test_mixed_floats(tiny, tmp_path):
    rules = {"down_proj": {"bits": 8}, "o_proj": {"act_bits": 16}}
    given = {"scheme": "MXFP4", "layer_config": rules, "iters": 0, "ignore_layers": "layers.0.mlp.gate_proj"}
    result = quantize(tiny("llama"), tmp_path / "out", format="auto_round", **given)
    assert kl_of(result)["auto_round"] < 1e-9


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"scheme": "FPW8A16", "group_size": 0, "format": "auto_round:fp8_static"}, "scheme FP8_STATIC"),
        ({"scheme": "FP8_STATIC", "group_size": -1, "format": "auto_round:fp8"}, "auto_round:fp8_static"),
        ({"scheme": "FP8_STATIC", "group_size": 32, "format": "auto_round:fp8_static"}, "each row"),
        ({"scheme": "MXFP4", "format": "auto_round:fp8"}, "not those of mxfp4"),
        ({"scheme": "MXINT4", "act_bits": 16}, "mxint4|mx_int|zero point|scale"),
        (
            {"scheme": "W4A16", "act_bits": 8, "act_data_type": "fp", "act_group_size": -1},
            "leave activations alone",
        ),
        ({"scheme": "MXFP4", "layer_config": {"down_proj": {"data_type": "int"}}}, "leave activations alone"),
        ({**INT8_STATIC, "act_sym": False}, "leave activations alone"),
        ({"scheme": "INT4"}, "leave activations alone"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_work(tiny, tmp_path, given, reason):
    with pytest.raises(UnsupportedError, match=reason):
        quantize(tiny("llama", **WIDE), tmp_path / "out", **{"format": "auto_round", **given})
