"""Packed experts run packed: those that tokens chose and no others, with the kernels of linear layers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.inference.experts import PackedExperts
from auto_round.inference.grouped_experts import GroupedExperts
from auto_round.inference.qlinear import QuantLinear
from auto_round.models.roles import fused_experts
from inference.folders import Request, write_folder

IDS = torch.tensor([[3, 17, 88, 41, 9, 60], [5, 5, 70, 23, 11, 2]])
LOCAL = (("num_local_experts", 4), ("num_experts_per_tok", 2))
QWEN = (
    ("num_experts", 4),
    ("num_experts_per_tok", 2),
    ("moe_intermediate_size", 64),
    ("head_dim", 32),
    ("decoder_sparse_step", 1),
)
LATENT = (
    ("n_routed_experts", 4),
    ("num_experts_per_tok", 2),
    ("moe_intermediate_size", 64),
    ("n_shared_experts", 1),
    ("n_group", 1),
    ("topk_group", 1),
    ("first_k_dense_replace", 1),
    ("head_dim", 32),
)
FOLDERS = {
    "qwen3_moe": Request(family="qwen3_moe", experts=True, overrides=QWEN),
    "other names": Request(family="mixtral", experts=True, overrides=LOCAL, packing="auto_round:auto_awq"),
    "dense first": Request(family="glm4_moe", experts=True, overrides=LATENT, sym=False),
}


def load(folder, backend="torch", **given):
    config = AutoRoundConfig(backend=backend)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **given)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def modules(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("name", FOLDERS)
def test_experts_stay_packed_and_predict_what_they_hold(tmp_path, name):
    oracle = write_folder(tmp_path, FOLDERS[name])
    model, found = load(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    stacks = sum(bool(fused_experts(m)) for m in oracle.modules())
    assert len(modules(model, GroupedExperts)) == stacks > 0
    assert not any(p.dim() == 3 for p in model.parameters())
    assert torch.equal(logits(model), logits(oracle))


def test_only_experts_that_were_chosen_are_multiplied(tmp_path):
    write_folder(tmp_path, FOLDERS["qwen3_moe"])
    model = load(tmp_path)
    experts = modules(model, GroupedExperts)[0]
    asked = []
    experts.register_forward_pre_hook(lambda module, args: asked.append(args[1]))
    ran = []
    for path, layer in experts.named_modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(lambda layer, args, path=path: ran.append((path, len(args[0]))))
    logits(model, IDS[:1, :1])
    (index,) = asked
    chosen = sorted(index.flatten().tolist())
    assert sorted(ran) == sorted((f"{e}.{p}_proj", 1) for e in chosen for p in ("gate", "up", "down"))


def test_memory_is_that_of_the_packed_weights(tmp_path):
    write_folder(tmp_path, FOLDERS["qwen3_moe"])
    experts = modules(load(tmp_path), GroupedExperts)[0]
    held = sum(b.numel() * b.element_size() for b in experts.buffers())
    held += sum(p.numel() * p.element_size() for p in experts.parameters())
    assert (
        8 * held / (4 * 3 * 128 * 64) < 5.2
    )  # 4 bits, and 16 for 32 of them, and whole bytes of zero points


def test_other_kernels_and_dtypes(tmp_path):
    oracle = write_folder(tmp_path, FOLDERS["qwen3_moe"])
    want = logits(oracle)
    model = load(tmp_path, "cpu_int4")
    assert {m.kernel.name for m in modules(model, QuantLinear)} == {"cpu_int4"}
    assert (logits(model) - want).abs().max() < 8 * 2**-8 * want.abs().max()
    half = load(tmp_path, dtype=torch.bfloat16)
    assert (logits(half).float() - want).abs().max() < 0.1 * want.abs().max()
    assert model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 9)


def test_a_plain_model_can_be_made_of_it(tmp_path):
    oracle = write_folder(tmp_path, FOLDERS["other names"])
    model = load(tmp_path)
    before = logits(model)
    plain = model.dequantize()
    assert not modules(plain, (QuantLinear, PackedExperts))
    assert torch.equal(logits(plain), before)
    state = oracle.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in plain.state_dict().items())


def test_gradients_pass_through(tmp_path):
    oracle = write_folder(tmp_path, FOLDERS["qwen3_moe"])
    found = []
    for model in (load(tmp_path), oracle):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        norm = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
        model(IDS).logits.square().mean().backward()
        found.append(norm.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_experts_of_which_half_is_quantized_are_unpacked(tmp_path):
    kept = tuple(
        (f"model.layers.{i}.mlp.experts.{e}.down_proj", {"bits": 16}) for i in (0, 1) for e in range(4)
    )
    oracle = write_folder(tmp_path, Request(family="qwen3_moe", experts=True, overrides=QWEN, extra=kept))
    model = load(tmp_path)
    assert not modules(model, PackedExperts)
    assert torch.equal(logits(model), logits(oracle))
