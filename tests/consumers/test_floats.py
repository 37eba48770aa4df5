"""Floating formats of compressed-tensors, counted and judged by hand-written headers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.consumers.inventory import take_inventory
from consumers.folders import compressed

N = 256
MX = {"type": "float", "group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"}
NV = {
    "type": "float",
    "num_bits": 4,
    "group_size": 16,
    "strategy": "tensor_group",
    "scale_dtype": "torch.float8_e4m3fn",
}
FP8 = {"type": "float", "num_bits": 8}
FP8_CODES = {"weight": torch.zeros(N, N, dtype=torch.float8_e4m3fn)}
TOKEN = {**FP8, "symmetric": True, "strategy": "token", "dynamic": True}
FIXED = {**FP8, "symmetric": True, "strategy": "tensor", "dynamic": False}
NOTHING = "no scheme for"


def mx(bits):
    codes = {"weight_packed": torch.zeros(N, N * bits // 8, dtype=torch.uint8)}
    return {**(FP8_CODES if bits == 8 else codes), "weight_scale": torch.zeros(N, N // 32, dtype=torch.uint8)}


def nv(**others):
    return {
        "weight_packed": torch.zeros(N, N // 2, dtype=torch.uint8),
        "weight_scale": torch.zeros(N, N // 16, dtype=torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
        **others,
    }


def fp8(*scale, **others):
    return {**FP8_CODES, "weight_scale": torch.ones(*scale, dtype=torch.bfloat16), **others}


def rounded(weights):
    return {**weights, "symmetric": True, "dynamic": True}


BLOCK = {**FP8, "strategy": "block", "block_structure": [128, 128]}
ONE = {"input_scale": torch.ones(1)}

CASES = {
    "MXFP4": ({**MX, "num_bits": 4}, mx(4), "mxfp4-pack-quantized", True, 4.25, "", NOTHING),
    "MXFP4A16": ({**MX, "num_bits": 4}, mx(4), "mxfp4-pack-quantized", None, 4.25, "", NOTHING),
    "MXFP6": ({**MX, "num_bits": 6}, mx(6), "mxfp6-pack-quantized", True, 6.25, NOTHING, NOTHING),
    "MXFP8": ({**MX, "num_bits": 8}, mx(8), "mxfp8-quantized", True, 8.25, "", NOTHING),
    "NVFP4A16": (NV, nv(), "nvfp4-pack-quantized", None, 4.5 + 32 / N**2, "", ""),
    "NVFP4": (
        NV,
        nv(input_global_scale=torch.ones(1)),
        "nvfp4-pack-quantized",
        {**NV, "symmetric": True, "dynamic": "local"},
        4.5 + 64 / N**2,
        "",
        "",
    ),
    "FP8A16 per tensor": (
        {**FP8, "strategy": "tensor"},
        fp8(1),
        "float-quantized",
        None,
        8 + 16 / N**2,
        "",
        "",
    ),
    "FP8 per row": ({**FP8, "strategy": "channel"}, fp8(N, 1), "float-quantized", TOKEN, 8 + 16 / N, "", ""),
    "FP8 per row static": (
        {**FP8, "strategy": "channel"},
        fp8(N, 1, **ONE),
        "naive-quantized",
        FIXED,
        8 + 16 / N + 32 / N**2,
        "",
        "",
    ),
    "FP8 128x128": (
        BLOCK,
        fp8(2, 2),
        "float-quantized",
        {**TOKEN, "strategy": "group", "group_size": 128},
        8 + 64 / N**2,
        "",
        "",
    ),
}


@pytest.mark.parametrize("label", CASES)
def test_what_is_there_and_who_loads_it(tmp_path, label):
    weights, tensors, form, inputs, bits, vllm, sglang = CASES[label]
    inputs = rounded(weights) if inputs is True else inputs
    folder = compressed(tmp_path / "m", weights, tensors, format=form, input_activations=inputs)
    found = take_inventory(folder)
    assert found.schemes == {label: (4, 4 * N * N)}
    assert found.bits_per_weight == pytest.approx(bits)
    verdicts = {v.engine: v for v in found.verdicts}
    assert verdicts["Transformers"].loads
    for engine, reason in (("vLLM", vllm), ("SGLang", sglang)):
        assert verdicts[engine].loads == (not reason), verdicts[engine].text
        assert reason in verdicts[engine].text


@pytest.mark.parametrize(
    ("weights", "tensors", "form", "inputs", "reason"),
    [
        ({**MX, "num_bits": 4}, mx(6), "mxfp4-pack-quantized", None, "another order of bytes (mxfp6"),
        ({**MX, "num_bits": 4}, nv(), "mxfp4-pack-quantized", None, "another order of bytes (nvfp4"),
        ({**FP8, "strategy": "channel"}, mx(8), "float-quantized", None, "another order of bytes (mxfp8"),
        ({**FP8, "strategy": "channel"}, fp8(1), "float-quantized", None, "weight_scale [256, 1]"),
        ({**FP8, "strategy": "channel"}, fp8(N, 1), "float-quantized", FIXED, "no input_scale"),
        (NV, nv(), "nvfp4-pack-quantized", {**rounded(NV), "dynamic": "local"}, "no input_global_scale"),
        ({**FP8, "strategy": "group", "group_size": 32}, fp8(N, 8), "float-quantized", None, NOTHING),
        (BLOCK, fp8(2, 2, **ONE), "float-quantized", FIXED, "measured activations only"),
        (
            NV,
            nv(input_global_scale=torch.ones(1)),
            "nvfp4-pack-quantized",
            TOKEN,
            "NVFP4 activations or with none",
        ),
        ({**FP8, "strategy": "channel"}, fp8(N, 1), "pack-quantized", None, "stored as pack-quantized"),
        (
            {**FP8, "strategy": "channel", "symmetric": False},
            fp8(N, 1),
            "float-quantized",
            None,
            "zero points",
        ),
    ],
)
def test_what_vllm_has_nothing_for(tmp_path, weights, tensors, form, inputs, reason):
    folder = compressed(tmp_path / "m", weights, tensors, format=form, input_activations=inputs)
    verdict = {v.engine: v for v in take_inventory(folder).verdicts}["vLLM"]
    assert not verdict.loads
    assert reason in verdict.text


def test_blocks_over_the_border_of_merged_matrices(tmp_path):
    folder = compressed(tmp_path / "m", BLOCK, fp8(2, 2), format="float-quantized")
    tensors = load_file(folder / "model.safetensors")
    for part, n in (("q_proj", 192), ("k_proj", 64)):
        tensors[f"model.layers.0.self_attn.{part}.weight"] = torch.zeros(n, N).to(torch.float8_e4m3fn)
        tensors[f"model.layers.0.self_attn.{part}.weight_scale"] = torch.ones(-(-n // 128), 2)
    save_file(tensors, folder / "model.safetensors")
    verdict = {v.engine: v for v in take_inventory(folder).verdicts}["vLLM"]
    assert "multiples of 128 outputs, not 64" in verdict.text


def test_what_becomes_of_activations_is_said(tmp_path):
    weights = {**MX, "num_bits": 4}
    folder = compressed(tmp_path / "m", weights, mx(4), format="mxfp4-pack-quantized")
    assert "rounds activations" in {v.engine: v for v in take_inventory(folder).verdicts}["vLLM"].text
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = rounded(weights)
    (folder / "config.json").write_text(json.dumps(config))
    text = {v.engine: v for v in take_inventory(folder).verdicts}["vLLM"].text
    assert "below compute capability 10.0 activations stay in 16 bits" in text
