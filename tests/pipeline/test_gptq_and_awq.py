"""GPTQ and AWQ folders of whole runs: the codes that were tuned, under the words of other tools."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.errors import UnsupportedError
from auto_round.testing.config_reader import READERS
from auto_round.testing.tiny_models import tiny_config, tiny_model
from pipeline.runs import ROWS, SIZES, kl_of, quantize, weights

EXPERTS = {"head_dim": 16, "moe_intermediate_size": 32}


def logits(folder):
    settings = {"quantization_config": AutoRoundConfig(backend="torch")} if packed(folder) else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(ROWS[-2:])).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def packed(folder):
    return config_of(folder).get("quantization_config")


def test_one_run_writes_the_same_codes_in_every_format(tiny, tmp_path):
    source = tiny("qwen2")
    result = quantize(source, tmp_path / "out", format="auto_gptq,gptqmodel,auto_awq,auto_round")
    assert kl_of(result) == dict.fromkeys(["auto_gptq", "gptqmodel", "auto_awq", "auto_round"], 0.0)
    assert [folder.name for folder in result.folders] == [*kl_of(result)]
    v1, v2, awq, own = result.folders
    methods = [packed(folder)["quant_method"] for folder in (v1, v2, awq, own)]
    assert methods == ["gptq", "gptq", "awq", "auto-round"]
    assert packed(v1)["checkpoint_format"] == "gptq"
    assert packed(v2)["checkpoint_format"] == "gptq_v2"
    for folder in (v1, v2, awq, own):
        assert json.loads((folder / "quantization_config.json").read_text()) == packed(folder)
        assert torch.equal(logits(folder), logits(own))
    first, second, plain = weights(v1), weights(v2), weights(own)
    for name in result.plan.quantized:
        for part in ("qweight", "scales"):
            assert torch.equal(first[f"{name}.{part}"], plain[f"{name}.{part}"])
            assert torch.equal(second[f"{name}.{part}"], plain[f"{name}.{part}"])
        assert (first[f"{name}.qzeros"] == 0x77777777).all()
        assert (second[f"{name}.qzeros"] == 0x88888888 - 2**32).all()
        assert first[f"{name}.g_idx"].tolist() == [i // 32 for i in range(len(first[f"{name}.g_idx"]))]


def test_these_folders_compute_in_float16_and_other_tensors_keep_their_bytes(tiny, tmp_path):
    source = tiny("qwen2")
    result = quantize(source, tmp_path / "out", format="auto_gptq,auto_awq,auto_round", iters=0, smooth=0)
    original = weights(source)
    biases = {f"{name}.bias" for name in result.plan.quantized} & original.keys()
    assert len(biases) == 2 * 3
    for folder in result.folders[:2]:
        assert config_of(folder)["dtype"] == "float16"
        stored = weights(folder)
        for name in original.keys() & stored.keys():
            assert stored[name].dtype is (torch.float16 if name in biases else torch.bfloat16)
            assert torch.equal(stored[name].float(), original[name].float())
    assert config_of(result.folders[2])["dtype"] == "bfloat16"
    assert all(weights(result.folders[2])[name].dtype is torch.bfloat16 for name in biases)


def test_models_that_need_the_range_of_bfloat16_keep_it(tiny, tmp_path):
    result = quantize(tiny("gemma2", head_dim=16), tmp_path / "out", format="auto_gptq", iters=0)
    assert config_of(result.folders[0])["dtype"] == "bfloat16"
    assert kl_of(result) == {"auto_gptq": 0.0}


def test_groups_without_negative_weights_in_version_1(tmp_path, caplog):
    model = tiny_model(tiny_config("llama", **SIZES), dtype=torch.bfloat16)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[:16].abs_()  # their zero points are 0, which version 1 cannot store
    with caplog.at_level(logging.WARNING, logger="auto_round"):
        result = quantize("", tmp_path / "out", live=model, format="auto_gptq,gptqmodel", sym=False, bits=2)
    assert "auto_gptq: " in caplog.text
    assert "version 1 of GPTQ" in caplog.text
    assert kl_of(result) == {"auto_gptq": 0.0, "gptqmodel": 0.0}
    v1, v2 = result.folders
    assert torch.equal(logits(v1), logits(v2))
    name = f"{result.plan.quantized[0]}.scales"
    assert (weights(v1)[name] < 0).any()
    assert (weights(v2)[name] > 0).all()


@pytest.mark.parametrize(
    "given",
    [
        {"scheme": "W4A16_MIXED", "format": "auto_gptq,gptqmodel"},
        {"scheme": "W4A16", "format": "auto_awq,auto_gptq", "ignore_layers": "layers.0.self_attn"},
    ],
)
def test_experts_routers_and_kept_layers(tiny, tmp_path, given):
    result = quantize(tiny("qwen3_moe", **EXPERTS), tmp_path / "out", **given, iters=0)
    assert all(kl == 0.0 for kl in kl_of(result).values())
    routers = [f"model.layers.{i}.mlp.gate" for i in range(2)]  # bare parameters, which no plan knows
    for folder in result.folders:
        stored, config = weights(folder), packed(folder)
        assert "model.layers.1.mlp.experts.3.down_proj.qweight" in stored
        assert all(f"{name}.qweight" in stored for name in result.plan.quantized)
        names = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
        for read in READERS[config["quant_method"]].values():
            assert not any(read(config, name, names) for name in [*routers, *result.plan.kept])
            assert all(read(config, name, names) for name in result.plan.quantized)


def test_a_quantized_head_of_its_own_scheme(tiny, tmp_path):
    result = quantize(
        tiny("llama"),
        tmp_path / "out",
        format="auto_gptq",
        quant_lm_head=True,
        layer_config={"lm_head": {"bits": 8, "group_size": 16}},
    )
    assert kl_of(result) == {"auto_gptq": 0.0}
    assert packed(result.folders[0])["lm_head"] is True
    assert "lm_head.g_idx" in weights(result.folders[0])


def test_refusals_name_the_format_before_any_work(tiny, tmp_path):
    with pytest.raises(UnsupportedError) as caught:
        quantize(tiny("llama"), tmp_path / "out", format="auto_gptq,auto_awq,gptqmodel", bits=3)
    assert {refusal.who for refusal in caught.value.refusals} == {"auto_awq"}
    assert "4 bits" in str(caught.value)
    assert "auto_gptq, gptqmodel can" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_shapes_that_cannot_be_packed_are_kept_as_in_the_auto_round_format(tiny, tmp_path):
    source = tiny("llama", intermediate_size=80)
    result = quantize(source, tmp_path / "out", format="auto_gptq,auto_awq,auto_round", iters=0)
    assert all(kl == 0.0 for kl in kl_of(result).values())
    assert {name.rpartition(".")[2] for name in result.plan.kept} == {
        "gate_proj",
        "up_proj",
        "down_proj",
        "lm_head",
    }
    for folder in result.folders:
        assert "model.layers.0.mlp.up_proj.weight" in weights(folder)
