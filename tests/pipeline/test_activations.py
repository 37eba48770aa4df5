"""Runs with quantized activations and compressed-tensors folders: what reloads is what was tuned."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.errors import CheckpointError, UnsupportedError
from auto_round.export.formats.llm_compressor import LLMCompressorFormat
from auto_round.inference import load_folder
from auto_round.numerics.activation import TokenInt
from auto_round.tuning.quantized_inputs import quantized_inputs
from pipeline.runs import ROWS, kl_of, quantize, weights

W8A8 = {"scheme": "INT8_W8A8", "group_size": -1}
LIBRARY = "compressed_tensors"
EXPERTS = {"head_dim": 16, "moe_intermediate_size": 32}


def logits(folder, dtype=torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return run(model)


def run(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ROWS[-2:])).logits


@pytest.mark.parametrize(
    "given",
    [
        {"scheme": "W4A16"},
        {"bits": 3, "sym": False},
        {"scheme": "W8A16", "quant_lm_head": True, "iters": 0},
        {"bits": 4, "layer_config": {"v_proj": {"bits": 8}}, "iters": 0},
    ],
    ids=str,
)
def test_packed_folders_equal_the_rounded_weights(tiny, tmp_path, given):
    pytest.importorskip(LIBRARY)
    result = quantize(tiny("llama"), tmp_path / "out", format="llm_compressor,fake", **given)
    # Zero points: Transformers dequantizes on loading, to bfloat16 even where the blocks ran in float32.
    assert kl_of(result)["llm_compressor"] < (1e-9 if given.get("sym", True) else 1e-4)
    assert torch.equal(logits(result.folders[0]), logits(result.folders[1]))
    stored = weights(result.folders[0])
    assert all(stored[f"{n}.weight_scale"].dtype is torch.bfloat16 for n in result.plan.quantized)


@pytest.mark.parametrize("sym", [True, False])
def test_folders_of_float32_models_lose_nothing(tiny, tmp_path, sym):
    """Loaders multiply in the dtype of the scales: in float16 one weight in twenty would differ."""
    pytest.importorskip(LIBRARY)
    model = tiny("llama", dtype=torch.float32)
    formats = "llm_compressor,fake,auto_round"
    result = quantize(model, tmp_path / "out", format=formats, bits=8, sym=sym, iters=0)
    assert kl_of(result)["llm_compressor"] < 1e-9
    packed, dense = (logits(folder, torch.float32) for folder in result.folders[:2])
    torch.testing.assert_close(packed, dense, rtol=1e-5, atol=1e-6)
    stored = weights(result.folders[0])
    assert all(stored[f"{n}.weight_scale"].dtype is torch.float32 for n in result.plan.quantized)


@pytest.mark.parametrize("given", [{}, {"iters": 0}, {"iters": 0, "act_sym": False}], ids=str)
def test_w8a8_folders_equal_the_tuned_model(tiny, tmp_path, given):
    pytest.importorskip(LIBRARY)
    result = quantize(tiny("llama"), tmp_path / "out", format="llm_compressor,fake", **W8A8, **given)
    assert kl_of(result)["llm_compressor"] < 1e-9
    packed = logits(result.folders[0])
    dense = AutoModelForCausalLM.from_pretrained(result.folders[1], dtype=torch.bfloat16).eval()
    assert not torch.equal(run(dense), packed)
    fmt = TokenInt(8, sym=given.get("act_sym", True))
    with quantized_inputs(dense, dict.fromkeys(result.plan.quantized, fmt)):
        assert torch.equal(run(dense), packed)
    config = json.loads((result.folders[0] / "quantization_config.json").read_text())
    assert config["format"] == "int-quantized"


def test_experts_are_packed_one_by_one(tiny, tmp_path):
    pytest.importorskip(LIBRARY)
    result = quantize(tiny("qwen3_moe", **EXPERTS), tmp_path / "out", format="llm_compressor", iters=0)
    assert kl_of(result)["llm_compressor"] < 3e-4  # experts are dequantized to bfloat16


def test_figures_see_quantized_activations(tiny, tmp_path):
    """Weights of 8 bits change next to nothing; activations of 4 bits change much."""
    common = {
        "bits": 8,
        "group_size": -1,
        "iters": 0,
        "format": "fake",
        "disable_opt_rtn": True,  # rounding fitted to 64 random tokens is no better on others
        "amp": False,
    }
    kl = {
        bits: quantize(tiny("llama"), tmp_path / str(bits), act_bits=bits, **common).report["held_out"]["kl"]
        for bits in (16, 8, 4)
    }
    assert kl[16] < kl[8] / 2
    assert kl[8] < kl[4] / 10


def test_tuning_sees_quantized_activations(tiny, tmp_path):
    common = {"bits": 3, "group_size": -1, "verify": False, "format": "fake", "nblocks": 2}
    first, second = (quantize(tiny("llama"), tmp_path / str(b), act_bits=b, **common) for b in (16, 4))
    losses = [r.report["blocks"][0]["initial_loss"] for r in (first, second)]
    assert losses[1] > losses[0] * 1.01
    pair = [weights(r.folders[0])["model.layers.1.mlp.up_proj.weight"] for r in (first, second)]
    assert not torch.equal(*pair)


def test_plain_rounding_writes_the_same_codes_without_data(tiny, tmp_path):
    given = {"format": "llm_compressor", "iters": 0, "disable_opt_rtn": True, "verify": False, **W8A8}
    alone = quantize(tiny("llama"), tmp_path / "alone", dataset=None, **given)
    with_data = quantize(tiny("llama"), tmp_path / "data", **given)
    assert "held_out" not in alone.report
    files = [r.folders[0] / "model.safetensors" for r in (alone, with_data)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_the_library_the_report_says_so(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        load_folder, "PACKAGES", {"compressed-tensors": ("no_such_module", "compressed-tensors")}
    )
    with caplog.at_level(logging.WARNING, "auto_round"):
        result = quantize(tiny("llama"), tmp_path / "out", format="llm_compressor", iters=0)
    assert "compressed-tensors" in result.report["verified"]["llm_compressor"]["skipped"]
    assert any("pip install compressed-tensors" in r.getMessage() for r in caplog.records)


def test_verification_finds_one_layer_packed_wrongly(tiny, tmp_path, monkeypatch):
    pytest.importorskip(LIBRARY)
    encode = LLMCompressorFormat.encode

    def wrong(self, layer, q):
        parts = dict(encode(self, layer, q))
        if layer.name == "model.layers.1.mlp.down_proj":
            parts[f"{layer.name}.weight"] = parts[f"{layer.name}.weight"].roll(1, 0)
        return parts

    monkeypatch.setattr(LLMCompressorFormat, "encode", wrong)
    with pytest.raises(CheckpointError, match="does not predict"):
        quantize(tiny("llama"), tmp_path / "out", format="llm_compressor", **W8A8)


@pytest.mark.parametrize(
    ("family", "changes", "given", "reason"),
    [
        ("qwen3_moe", EXPERTS, {"format": "llm_compressor", "quant_lm_head": True}, "outside of the blocks"),
        ("llama", {}, {"format": "llm_compressor", "quant_lm_head": True}, "outside of the blocks"),
        ("llama", {}, {"format": "auto_gptq"}, "leave activations alone"),
        ("llama", {}, {"format": "llm_compressor", "act_dynamic": False}, "a step that calibration fixes"),
        ("llama", {}, {"format": "llm_compressor", "act_group_size": 32}, "groups of 32"),
        ("llama", {}, {"format": "llm_compressor", "scale_dtype": "fp16"}, "model's dtype"),
    ],
)
def test_refusals_come_before_any_work(tiny, tmp_path, family, changes, given, reason):
    with pytest.raises(UnsupportedError, match=reason):
        quantize(tiny(family, **changes), tmp_path / "out", **W8A8, **given)
    assert not list(tmp_path.iterdir())
