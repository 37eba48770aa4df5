"""Transformers loads hand-written folders through this package; the dequantized model is the oracle."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.errors import CheckpointError, ConfigError, Refusal, UnsupportedError
from auto_round.inference.qlinear import QuantLinear
from auto_round.kernels import cpu_avx512
from inference.folders import Request, tiny_model, write_folder

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

IDS = torch.arange(2, 34).view(2, 16)

QWEN_MOE = (
    ("num_experts", 4),
    ("num_experts_per_tok", 2),
    ("moe_intermediate_size", 64),
    ("head_dim", 32),
    ("decoder_sparse_step", 1),
)
MIXTRAL = (("num_local_experts", 4), ("num_experts_per_tok", 2))
MIXED = (
    ("model.layers.0.mlp.down_proj", {"bits": 8, "group_size": 64}),
    ("model.layers.1.self_attn.o_proj", {"bits": 16, "data_type": "float"}),
)

REQUESTS = {
    "gptq": Request(),
    "gptq2": Request(bits=2),
    "gptq3-rows": Request(bits=3, group_size=-1),
    "gptq8": Request(bits=8, group_size=128),
    "plain3-asym": Request(packing="auto_round", bits=3, sym=False),
    "awq-asym": Request(packing="auto_round:auto_awq", sym=False),
    "mixed": Request(packing="auto_round:gptqmodel", sym=False, extra=MIXED),
    "head": Request(head=True),
    "qwen2-bias": Request(family="qwen2"),
    "qwen3-moe": Request(family="qwen3_moe", experts=True, overrides=QWEN_MOE),
    "mixtral-renamed": Request(family="mixtral", experts=True, overrides=MIXTRAL),
    "bf16": Request(dtype=torch.bfloat16),
    "fp16": Request(dtype=torch.float16, packing="auto_round", sym=False),
}


def load(folder, backend="auto", **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=AutoRoundConfig(backend=backend), **options
    )


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def kernels(model):
    return {m.kernel.name for m in model.modules() if isinstance(m, QuantLinear)}


def test_version_is_one_that_transformers_takes():
    assert int(importlib.metadata.version("auto_round").split(".")[0]) >= 1


@pytest.mark.parametrize("name", REQUESTS)
def test_reference_equals_the_dequantized_model(tmp_path, name):
    oracle = write_folder(tmp_path, REQUESTS[name])
    model, info = load(tmp_path, "torch", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == REQUESTS[name].dtype
    assert kernels(model) == {"torch"}
    assert torch.equal(logits(model), logits(oracle))


@pytest.mark.parametrize("name", ["gptq", "bf16"])
def test_scales_that_transformers_widens_are_read_as_stored(tmp_path, monkeypatch, name):
    """Some models keep everything called "scale" in float32, which also finds the scales of packed layers."""
    oracle = write_folder(tmp_path, REQUESTS[name])
    monkeypatch.setattr(type(oracle), "_keep_in_fp32_modules_strict", {"scale"})
    assert torch.equal(logits(load(tmp_path, "torch")), logits(oracle))


@pytest.mark.parametrize("name", [n for n in REQUESTS if n not in ("gptq8", "mixed")])
def test_int4_kernel_is_near_the_dequantized_model(tmp_path, name):
    oracle = write_folder(tmp_path, REQUESTS[name])
    model = load(tmp_path, "cpu_int4")
    assert kernels(model) == {"cpu_int4"}
    want = logits(oracle).double()
    # Two blocks of bfloat16 steps, u = 2**-8 each, against the spread of the logits.
    assert (logits(model).double() - want).abs().max() < 8 * 2**-8 * want.abs().max()
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape == (1, 20)


@pytest.fixture
def without_program(monkeypatch):
    """A machine without the compiler or the instructions of `cpu_avx512`."""
    monkeypatch.setattr(cpu_avx512, "_program", lambda: Refusal("cpu_avx512.c", "no C compiler is here"))


def test_kernel_by_dtype(tmp_path, without_program):
    write_folder(tmp_path, Request(dtype=torch.bfloat16, extra=MIXED, packing="auto_round"))
    model = load(tmp_path)
    assert kernels(model) == {"cpu_int4", "cpu_int8"}  # one layer has 8 bits
    assert model.model.layers[0].mlp.down_proj.kernel.name == "cpu_int8"
    assert type(model.model.layers[1].self_attn.o_proj) is torch.nn.Linear
    assert kernels(load(tmp_path, dtype=torch.float32)) == {"torch"}
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("name", ["gptq", "plain3-asym", "mixed"])
def test_the_compiled_program_predicts_what_the_operator_predicts(tmp_path, name):
    if not isinstance(cpu_avx512._program(), Refusal):
        write_folder(tmp_path, REQUESTS[name])
        model, other = load(tmp_path, "cpu_avx512"), load(tmp_path, "torch")
        assert kernels(model) == {"cpu_avx512"}
        want = logits(other)
        assert not torch.equal(logits(model), want.flip(0))
        assert (logits(model) - want).abs().max() < 0.05 * want.abs().max()


def test_memory_is_that_of_the_packed_weights(tmp_path):
    write_folder(tmp_path, Request(dtype=torch.bfloat16, group_size=128))
    for backend in ("torch", "cpu_int4"):
        layer = load(tmp_path, backend).model.layers[0].mlp.up_proj
        kept = sum(b.numel() * b.element_size() for b in layer.buffers())
        assert 8 * kept / (256 * 128) < 4.6


@pytest.mark.parametrize("backend", ["torch", "cpu_int4"])
@pytest.mark.parametrize("name", ["gptq", "awq-asym", "plain3-asym", "head", "qwen3-moe"])
def test_saving_a_loaded_model(tmp_path, name, backend):
    (tmp_path / "a").mkdir()
    write_folder(tmp_path / "a", REQUESTS[name])
    model = load(tmp_path / "a", backend)
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b", backend)), logits(model))
    old, new = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert set(old) == set(new)
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_patterns_and_blocks(tmp_path):
    config = {"extra_config": {r".*\.mlp\..*": {"bits": 16, "data_type": "float"}, "down": {"bits": 2}}}
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")]
    request = Request(extra=tuple((n, {"bits": 16}) for n in names), config=tuple(config.items()))
    oracle = write_folder(tmp_path, request)
    assert torch.equal(logits(load(tmp_path, "torch")), logits(oracle))


RULES = {
    # keys of extra_config -> what each layer of a Llama is, by the rules of auto-round's own loader
    "part": ({"k_proj": {"bits": 8}}, {"k_proj": 8}),
    "part and pattern": ({"down": {"bits": 8}, ".*down.*": {"bits": 16}}, {"down_proj": 16}),
    "pattern, then part": ({".*up_proj": {"bits": 16}, "k_proj": {"bits": 8}}, {"up_proj": 16, "k_proj": 8}),
    "exact first": (
        {"mlp": {"bits": 2}, "model.layers.0.mlp.up_proj": {"bits": 8}},
        {"mlp": 2, "layers.0.mlp.up_proj": 8},
    ),
    "a name is no part": ({"model.layers.0.mlp.up_proj": {"bits": 8}}, {"layers.0.mlp.up_proj": 8}),
    "outside of the blocks": ({"head": {"bits": 8}}, {"lm_head": 8}),
    "nothing said": ({"k_proj": {}}, {}),
    "found nowhere": ({"router": {"bits": 8}, r".*\.moe\..*": {"bits": 8}}, {}),
}


@pytest.mark.parametrize("name", RULES)
def test_keys_that_name_several_layers(tmp_path, name):
    config, said = RULES[name]
    layers = [n for n, m in tiny_model(Request()).named_modules() if isinstance(m, torch.nn.Linear)]
    bits = {n: next((b for part, b in reversed(said.items()) if part in n), None) for n in layers}
    extra = tuple((n, {"bits": b}) for n, b in bits.items() if b is not None)
    oracle = write_folder(
        tmp_path, Request(extra=extra, head="lm_head" in said, config=(("extra_config", config),))
    )
    model, info = load(tmp_path, "torch", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(model), logits(oracle))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("filled", [True, False])
def test_a_short_last_group(tmp_path, sym, filled):
    """Rows of 128 in groups of 96; auto-round's model-free mode stores the last group at full length."""
    packing = "auto_round:auto_gptq" if sym else "auto_round"
    mark = (("model_free", True),) if filled else ()
    oracle = write_folder(tmp_path, Request(packing=packing, group_size=96, sym=sym, config=mark))
    stored = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.q_proj.qweight"]
    assert stored.shape == ((192 if filled else 128) * 4 // 32, 128)
    model = load(tmp_path, "torch")
    assert torch.equal(logits(model), logits(oracle))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", "torch")), logits(oracle))


def test_block_restriction(tmp_path):
    names = [f"model.layers.0.{m}.{p}_proj" for m, ps in PARTS.items() for p in ps]
    request = Request(
        extra=tuple((n, {"bits": 16}) for n in names),
        config=(
            ("extra_config", {}),
            ("block_name_to_quantize", None),
            ("to_quant_block_names", ["model.layers.1"]),
        ),
    )
    oracle = write_folder(tmp_path, request)
    assert torch.equal(logits(load(tmp_path, "torch")), logits(oracle))


PARTS = {"self_attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


def test_blocks_are_found_when_none_are_named(tmp_path):
    oracle = write_folder(tmp_path, Request(config=(("block_name_to_quantize", None),)))
    assert torch.equal(logits(load(tmp_path, "torch")), logits(oracle))


@pytest.mark.parametrize("version", ["gptq", "awq"])
def test_checkpoints_of_others(tmp_path, version):
    """GPTQ and AWQ folders, read because an AutoRoundConfig was passed."""
    packing = {"gptq": "auto_round:gptq", "awq": "auto_round:awq"}[version]
    oracle = write_folder(tmp_path, Request(packing=packing, sym=version == "gptq"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    }[version]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(tmp_path, "torch")), logits(oracle))


def damage(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round"])
@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_missing_tensors_are_errors(tmp_path, packing, suffix):
    write_folder(tmp_path, Request(packing=packing, sym=packing != "auto_round"))
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    damage(tmp_path, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj.*" + suffix):
        load(tmp_path)


def test_damaged_tensors_are_errors(tmp_path):
    write_folder(tmp_path, Request())
    damage(tmp_path, lambda t: t["model.layers.0.mlp.up_proj.qzeros"].fill_(0))
    with pytest.raises(CheckpointError, match=r"up_proj.*qzeros"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"packing_format": "auto_round:mlx"}, UnsupportedError, "not in this version"),
        ({"packing_format": "auto_round:llm_compressor"}, UnsupportedError, "int of 4 bits"),
        ({"data_type": "mx_fp"}, UnsupportedError, "mx_fp"),
        ({"act_bits": 8}, UnsupportedError, "activations: groups of 32 are not there yet"),
        ({"desc_act": True}, UnsupportedError, "desc_act"),
        ({"extra_config": {"*.mlp": {"bits": 8}}}, ConfigError, "regular expression"),
        ({"scale_dtype": "torch.int8"}, ConfigError, "scale_dtype"),
        ({"block_name_to_quantize": "decoder.blocks"}, ConfigError, "no linear layer"),
    ],
)
def test_configurations_that_cannot_be_loaded(tmp_path, config, error, message):
    write_folder(tmp_path, Request(config=tuple(config.items())))
    with pytest.raises(error, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [("cpu_int5", ConfigError, "cpu_int4"), ("marlin", UnsupportedError, "runs on cuda")],
)
def test_backends_that_cannot_be_had(tmp_path, backend, error, message):
    write_folder(tmp_path, Request())
    with pytest.raises(error, match=message):
        load(tmp_path, backend)


def test_model_without_mapping_config():
    """`convert_hf_model` takes the configuration as a mapping too."""
    from auto_round.inference.convert_model import convert_hf_model

    model = tiny_model(Request())
    model.config.quantization_config = {"bits": 4, "group_size": 32, "packing_format": "auto_round"}
    converted, used = convert_hf_model(model, "cpu")
    assert converted is model
    assert used == ["torch"]


def test_a_folder_that_keeps_every_layer(tmp_path):
    """auto-round 0.16.1 writes such folders for 8 bits a channel without data: 16 bits for each layer."""
    model = tiny_model(Request())
    model.save_pretrained(tmp_path)
    names = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 8,
        "group_size": -1,
        "sym": True,
        "extra_config": {name: {"bits": 16, "data_type": "float"} for name in names},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
