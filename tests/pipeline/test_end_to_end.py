"""The main job on tiny models: what is written is what was tuned, whatever the model and the options."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.errors import CheckpointError
from auto_round.export.formats.auto_round import AutoRoundFormat
from auto_round.pipeline.running import unit
from auto_round.testing.tiny_models import tiny_config, tiny_model
from auto_round.tuning.sign_round import tune_block
from pipeline.runs import ROWS, SIZES, kl_of, quantize, tree, weights

HEADS = {"head_dim": 16}
GPTQMODEL = "auto_round:gptqmodel"
EXPERTS = {**HEADS, "moe_intermediate_size": 32}


def logits(folder, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(ROWS[-2:])).logits


def most_values(weight, group):
    """Most different values in a group of a row."""
    groups = weight.float().unflatten(-1, (-1, group)).flatten(0, -2).sort(-1).values
    return int(((groups.diff(dim=-1) != 0).sum(-1) + 1).max())


@pytest.mark.parametrize(
    ("family", "changes", "given", "packing"),
    [
        ("llama", {}, {"format": "auto_round"}, "auto_round:auto_gptq"),
        ("llama", {}, {"format": "auto_round", "sym": False, "bits": 2}, "auto_round"),
        ("llama", {}, {"format": "auto_round", "sym": False}, "auto_round:auto_awq"),
        ("llama", {}, {"format": "auto_round:auto_gptq", "sym": False}, "auto_round:auto_gptq"),
        (
            "llama",
            {},
            {"format": GPTQMODEL, "bits": 8, "group_size": -1},
            "auto_round:gptqmodel",
        ),
        ("qwen3", HEADS, {"format": "auto_round", "bits": 3}, "auto_round:auto_gptq"),
        ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 96}, {"iters": 0}, "auto_round:auto_gptq"),
    ],
)
def test_packed_folders_equal_the_rounded_weights(tiny, tmp_path, family, changes, given, packing):
    packed = given.get("format", "auto_round")
    given = {**given, "format": f"{packed},fake", "smooth": 0}  # other tensors stay as they are
    result = quantize(tiny(family, **changes), tmp_path / "out", **given)
    assert kl_of(result) == {packed: 0.0, "fake": 0.0}
    folder, fake = result.folders
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["packing_format"] == packing
    plain = logits(fake)
    assert torch.equal(logits(folder, quantization_config=AutoRoundConfig(backend="torch")), plain)
    original, rounded = weights(tiny(family, **changes)), weights(fake)
    quantized = {f"{name}.weight" for name in result.plan.quantized}
    assert len(quantized) >= 12
    for name, weight in original.items():
        if name in quantized:
            assert most_values(
                rounded[name], weight.shape[1] if "group_size" in given else 32
            ) <= 2 ** given.get("bits", 4)
            assert not torch.equal(rounded[name], weight)
        else:
            assert torch.equal(rounded[name], weight), name


@pytest.mark.parametrize("family", ["gemma2", "cohere2"])
def test_masks_that_differ_between_blocks(tiny, tmp_path, family):
    heads = HEADS if family == "gemma2" else {}
    result = quantize(tiny(family, **heads), tmp_path / "out", format="auto_round,fake", sym=False)
    assert kl_of(result) == {"auto_round": 0.0, "fake": 0.0}
    assert torch.equal(
        logits(result.folders[0], quantization_config=AutoRoundConfig(backend="torch")),
        logits(result.folders[1]),
    )


@pytest.mark.parametrize(
    ("family", "changes", "given"),
    [
        ("qwen3_moe", EXPERTS, {"scheme": "W4A16_MIXED"}),
        ("mixtral", {}, {"bits": 2}),
        ("qwen3_moe", EXPERTS, {"iters": 0}),
    ],
)
def test_experts(tiny, tmp_path, family, changes, given):
    result = quantize(tiny(family, **changes), tmp_path / "out", format="auto_round,fake", **given)
    kl = kl_of(result)
    # Packed experts are multiplied one by one, those of the tuned model by Transformers' grouped product, so
    # sums are rounded otherwise. The weights are the same ones.
    assert kl["fake"] == 0.0
    assert kl["auto_round"] < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(result.folders[1], dtype=torch.bfloat16).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(result.folders[0], dtype=torch.bfloat16).dequantize()
    assert all(torch.equal(weight, plain[name]) for name, weight in loaded.state_dict().items())
    experts = [name for name in result.plan.quantized if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    if given.get("scheme") == "W4A16_MIXED":
        bits = {result.plan.scheme_of(n).bits for n in result.plan.quantized if n not in experts}
        assert {result.plan.scheme_of(n).bits for n in experts} == {4}
        assert bits == {8}
    stored = weights(result.folders[0])
    assert all(f"{name}.qweight" in stored for name in result.plan.quantized)


def test_one_scale_for_a_whole_matrix_of_fused_experts(tiny, tmp_path):
    """Halves of an expert's fused matrix lie apart on disk; each takes the scale of the whole."""
    result = quantize(tiny("qwen3_moe", **EXPERTS), tmp_path / "out", group_size=0, format="fake")
    assert kl_of(result)["fake"] == 0.0
    stored = weights(result.folders[0])
    for name in result.plan.quantized:
        assert len(stored[f"{name}.weight"].unique()) <= 16


def test_what_a_model_keeps_in_float32_stays_so_while_it_is_tuned(tiny, tmp_path, monkeypatch):
    seen = {}

    def spy(group, tasks, *args, **kwargs):
        seen.update({name: t.dtype for name, t in [*group.named_parameters(), *group.named_buffers()]})
        return tune_block(group, tasks, *args, **kwargs)

    monkeypatch.setattr(unit, "tune_block", spy)
    changes = {"first_k_dense_replace": 1, "moe_intermediate_size": 32, "head_dim": 16}
    result = quantize(tiny("glm4_moe", **changes), tmp_path / "out")
    wide = {name.partition(".")[2] for name, dtype in seen.items() if dtype is torch.float32}
    assert {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"} <= wide
    assert seen["0.self_attn.q_proj.weight"] is torch.bfloat16
    assert kl_of(result)["auto_round"] < 1e-5


def test_a_quantized_tied_head_is_written_apart(tiny, tmp_path):
    source = tiny("qwen3", tie_word_embeddings=True, **HEADS)
    result = quantize(source, tmp_path / "out", quant_lm_head=True, format="auto_round,fake")
    assert kl_of(result) == {"auto_round": 0.0, "fake": 0.0}
    for folder, tensor in zip(result.folders, ("lm_head.qweight", "lm_head.weight"), strict=True):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        stored = weights(folder)
        assert tensor in stored
        assert torch.equal(stored["model.embed_tokens.weight"], weights(source)["model.embed_tokens.weight"])
    assert result.report["held_out"]["kl"] > 0


def test_a_head_of_its_own_is_quantized(tiny, tmp_path):
    result = quantize(tiny("llama"), tmp_path / "out", quant_lm_head=True)
    assert kl_of(result)["auto_round"] == 0.0
    stored = weights(result.folders[0])
    assert "lm_head.qweight" in stored
    assert "lm_head.weight" not in stored


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_a_quantized_head_whose_output_is_scaled_or_capped(tiny, tmp_path, family):
    changes = HEADS if family == "gemma2" else {}
    given = {"quant_lm_head": True, "scheme": "W8A16", "iters": 0}
    result = quantize(tiny(family, **changes), tmp_path / "out", **given)
    assert kl_of(result)["auto_round"] == 0.0
    assert result.report["held_out"]["kl"] < 1e-2


def test_neighbouring_blocks_as_one(tiny, tmp_path):
    result = quantize(tiny("llama"), tmp_path / "out", nblocks=2)
    assert [entry["unit"] for entry in result.report["blocks"]] == ["model.layers.0 to model.layers.1"]
    assert kl_of(result)["auto_round"] == 0.0


def test_norms_are_tuned_and_written(tiny, tmp_path):
    result = quantize(tiny("qwen3", **HEADS), tmp_path / "out", enable_norm_bias_tuning=True, lr=0.3)
    assert kl_of(result)["auto_round"] == 0.0
    before, after = weights(tiny("qwen3", **HEADS)), weights(result.folders[0])
    norms = [name for name in before if "norm" in name and ".layers." in name]
    changed = [name for name in norms if not torch.equal(before[name], after[name])]
    assert len(changed) > len(norms) / 2
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_what_is_masked_does_not_matter(tiny, tmp_path):
    def rows(padding):
        found = []
        for i, ids in enumerate(ROWS):
            keep = 16 - i % 5
            ones, zeros, fill = [1] * keep, [0] * (16 - keep), [padding] * (16 - keep)
            right = {"input_ids": ids[:keep] + fill, "attention_mask": ones + zeros}
            left = {"input_ids": fill + ids[:keep], "attention_mask": zeros + ones}
            found.append(left if i % 2 else right)
        return found

    first = quantize(tiny("llama"), tmp_path / "first", dataset=rows(5))
    second = quantize(tiny("llama"), tmp_path / "second", dataset=rows(77))
    whole = quantize(tiny("llama"), tmp_path / "whole")
    assert kl_of(first)["auto_round"] < 1e-6
    files = [r.folders[0] / "model.safetensors" for r in (first, second, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()
    assert first.report["held_out"]["kl"] == second.report["held_out"]["kl"]


def test_quantized_inputs_are_an_option(tiny, tmp_path):
    """With unquantized inputs the second block does not depend on the first; with quantized ones it does."""

    def second_block(name, **given):
        result = quantize(tiny("llama"), tmp_path / name, bits=2, verify=False, **given)
        stored = weights(result.folders[0])
        return torch.cat([t.float().flatten() for n, t in stored.items() if n.startswith("model.layers.1.")])

    off = {"enable_quanted_input": False}
    kept = {"ignore_layers": "layers.0."}
    assert torch.equal(second_block("a", **off), second_block("b", **off, **kept))
    assert not torch.equal(second_block("c"), second_block("d", **kept))


@pytest.mark.parametrize("given", [{}, {"disable_opt_rtn": True}, {"disable_opt_rtn": False, "sym": False}])
def test_without_tuning(tiny, tmp_path, given):
    result = quantize(tiny("llama"), tmp_path / "out", iters=0, **given)
    assert kl_of(result)["auto_round"] == 0.0
    assert all("loss" not in entry for entry in result.report["blocks"])


def test_plain_rounding_needs_no_data(tiny, tmp_path):
    plain = {"iters": 0, "disable_opt_rtn": True}
    alone = quantize(tiny("llama"), tmp_path / "alone", dataset=None, **plain)
    with_data = quantize(tiny("llama"), tmp_path / "data", **plain)
    assert "held_out" not in alone.report
    assert with_data.report["held_out"]["kl"] > 0
    files = [r.folders[0] / "model.safetensors" for r in (alone, with_data)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_layer_config(tiny, tmp_path):
    rules = {"v_proj": {"bits": 8}, "model.layers.1.mlp.up_proj": {"bits": 2, "group_size": 16}}
    result = quantize(
        tiny("llama"), tmp_path / "out", layer_config=rules, ignore_layers="o_proj", format="auto_round,fake"
    )
    assert kl_of(result) == {"auto_round": 0.0, "fake": 0.0}
    before, after = weights(tiny("llama")), weights(result.folders[1])
    assert most_values(after["model.layers.0.self_attn.v_proj.weight"], 32) > 16
    assert most_values(after["model.layers.1.mlp.up_proj.weight"], 16) <= 4
    assert most_values(after["model.layers.0.mlp.up_proj.weight"], 32) > 4
    assert torch.equal(
        before["model.layers.0.self_attn.o_proj.weight"], after["model.layers.0.self_attn.o_proj.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(tiny, tmp_path, dtype):
    result = quantize(tiny("llama", dtype=dtype), tmp_path / "out", format="auto_round,fake")
    assert kl_of(result)["auto_round"] == 0.0
    assert kl_of(result)["fake"] < 1e-4
    stored = weights(result.folders[1])
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype is dtype


def test_without_amp_in_float32(tiny, tmp_path):
    result = quantize(tiny("llama", dtype=torch.float32), tmp_path / "out", amp=False)
    assert kl_of(result)["auto_round"] < 1e-9


def test_a_model_in_memory_stays_as_it_is_and_gives_the_same_codes(tiny, tmp_path):
    live = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    attention = live.config._attn_implementation
    first = quantize("", tmp_path / "live", live=live, enable_norm_bias_tuning=True)
    second = quantize(tiny("llama"), tmp_path / "disk", enable_norm_bias_tuning=True)
    assert live.config._attn_implementation == attention
    after = live.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    stored = [weights(r.folders[0]) for r in (first, second)]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_a_live_model_of_experts(tmp_path):
    live = tiny_model(tiny_config("qwen3_moe", **SIZES, **EXPERTS), dtype=torch.bfloat16)
    result = quantize("", tmp_path / "out", live=live)
    assert kl_of(result)["auto_round"] == 0.0


def test_same_command_same_bytes(tiny, tmp_path):
    given = {"format": "auto_round,fake", "enable_norm_bias_tuning": True, "max_shard_size": "64KB"}
    for name in ("first", "second"):
        quantize(tiny("qwen3", **HEADS), tmp_path / name, **given)
    one, other = tree(tmp_path / "first"), tree(tmp_path / "second")
    assert any("-of-" in name for name in one)
    assert one == other
    quantize(tiny("qwen3", **HEADS), tmp_path / "third", **given, seed=43)
    assert tree(tmp_path / "third") != one


def _swapped_nibbles(word):
    return ((word >> 4) & 0x0F0F0F0F) | ((word & 0x0F0F0F0F) << 4)


def _shifted_group(scales):
    return scales.roll(1, 0)


@pytest.mark.parametrize(
    ("suffix", "change"), [("qweight", _swapped_nibbles), ("scales", _shifted_group)], ids=["codes", "scales"]
)
def test_verification_finds_one_layer_packed_wrongly(tiny, tmp_path, monkeypatch, suffix, change):
    encode = AutoRoundFormat.encode

    def wrong(self, layer, q):
        parts = dict(encode(self, layer, q))
        if layer.name == "model.layers.1.mlp.down_proj":
            name = f"{layer.name}.{suffix}"
            parts[name] = change(parts[name]).contiguous()
        return parts

    monkeypatch.setattr(AutoRoundFormat, "encode", wrong)
    with pytest.raises(CheckpointError, match="does not predict"):
        quantize(tiny("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
