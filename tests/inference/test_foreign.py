"""GPTQ and AWQ checkpoints through `AutoRoundConfig`, as Transformers hands them over."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.layouts.table import AWQ_GEMM, CHECKPOINT_LAYOUTS, GPTQ_V1
from auto_round.stored.formats import StoredFormats
from auto_round.stored.gptq_awq_config import foreign_method
from inference.folders import Request, write_folder

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

IDS = torch.arange(2, 34).view(2, 16)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
V2 = {**GPTQ, "checkpoint_format": "gptq_v2", "sym": False}
MIXED = (
    ("model.layers.0.mlp.down_proj", {"bits": 8, "group_size": 64}),
    ("model.layers.1.self_attn.o_proj", {"bits": 16}),
)
DOWN = tuple((f"model.layers.{i}.mlp.down_proj", {"bits": 16}) for i in (0, 1))
EXPERTS = (("num_local_experts", 4), ("num_experts_per_tok", 2))


def load(folder, **options):
    config = AutoRoundConfig(backend="torch")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def write(folder, config, request, index=True, order=None):
    """A folder with another tool's configuration; returns the float model."""
    oracle = write_folder(folder, request)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    if index and config["quant_method"] == "gptq":
        tensors = load_file(folder / "model.safetensors")
        for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
            groups, out = tensors[f"{name}.scales"].shape
            n_in = tensors[f"{name}.qweight"].shape[0] * out // tensors[f"{name}.qzeros"].shape[1]
            tensors[f"{name}.g_idx"] = torch.arange(n_in, dtype=torch.int32) // (n_in // groups)
        if order is not None:
            tensors[f"{order}.g_idx"] = tensors[f"{order}.g_idx"].flip(0)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return oracle


CASES = {
    "gptq": (GPTQ, Request(packing="auto_round:gptq")),
    "gptq, act order in name only": ({**GPTQ, "desc_act": True}, Request(packing="auto_round:gptq")),
    "gptq v2": (V2, Request(packing="auto_round", sym=False)),
    "gptq v1, asymmetric": ({**GPTQ, "sym": False}, Request(packing="auto_round:gptq", sym=False)),
    "dynamic": (
        {
            **V2,
            "dynamic": {r"-:.*\.1\.self_attn\.o_proj": {}, r"+:.*\.0\..*down": {"bits": 8, "group_size": 64}},
        },
        Request(packing="auto_round", sym=False, extra=MIXED),
    ),
    "list": (
        {
            **GPTQ,
            "modules_in_block_to_quantize": [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
            ],
        },
        Request(packing="auto_round:gptq", extra=DOWN),
    ),
    "head": ({**GPTQ, "lm_head": True}, Request(packing="auto_round:gptq", head=True)),
    "experts": (GPTQ, Request(packing="auto_round:gptq", family="mixtral", experts=True, overrides=EXPERTS)),
    "awq": (AWQ, Request(packing="auto_round:awq", sym=False)),
    "awq, kept": (
        {**AWQ, "modules_to_not_convert": ["lm_head", "down_proj"]},
        Request(packing="auto_round:awq", sym=False, extra=DOWN),
    ),
    "awq, older words": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "gemm"},
        Request(packing="auto_round:awq", sym=False),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_of_other_tools(tmp_path, name):
    config, request = CASES[name]
    oracle = write(tmp_path, config, request)
    model, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(model), logits(oracle))


def test_without_g_idx(tmp_path):
    oracle = write(tmp_path, GPTQ, Request(packing="auto_round:gptq"), index=False)
    assert torch.equal(logits(load(tmp_path)), logits(oracle))


def test_saved_again(tmp_path):
    (tmp_path / "a").mkdir()
    oracle = write(tmp_path / "a", GPTQ, Request(packing="auto_round:gptq"))
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    old, new = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert set(old) == set(new)
    assert all(torch.equal(old[n], new[n]) for n in old)
    assert torch.equal(logits(load(tmp_path / "b")), logits(oracle))


@pytest.mark.parametrize(
    "layer", ["model.layers.1.mlp.up_proj", "model.layers.0.block_sparse_moe.experts.2.w3"]
)
def test_reordered_inputs_are_refused_by_name(tmp_path, layer):
    experts = "experts" in layer
    family = {"family": "mixtral", "experts": True, "overrides": EXPERTS} if experts else {}
    write(tmp_path, {**GPTQ, "desc_act": True}, Request(packing="auto_round:gptq", **family), order=layer)
    with pytest.raises(UnsupportedError, match=f'"{layer}".*reordered'):
        load(tmp_path)


def test_order_that_is_not_there(tmp_path):
    write(tmp_path, {**GPTQ, "desc_act": True}, Request(packing="auto_round:gptq"), index=False)
    with pytest.raises(UnsupportedError, match="g_idx is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({**GPTQ, "checkpoint_format": "marlin"}, UnsupportedError, "marlin"),
        ({**GPTQ, "format": "bitblas"}, UnsupportedError, "bitblas"),
        ({**GPTQ, "dynamic": {"-:*": {}}}, ConfigError, "dynamic"),
    ],
)
def test_what_cannot_be_read(config, error, message):
    with pytest.raises(error, match=message):
        StoredFormats.read(config, ("model.layers",)).layer(("model.layers.0.up",))


def test_whose_configuration_it_is():
    ours = {"quant_method": "auto-round", "packing_format": "auto_round:gptq", "bits": 4, "sym": True}
    assert foreign_method(ours) is None
    assert StoredFormats.read(ours, ()).layout is GPTQ_V1
    assert foreign_method({**ours, "packing_format": "auto_round:awq"}) is None
    handed = {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:gptq"}
    assert foreign_method(handed) == foreign_method(GPTQ) == "gptq"
    assert StoredFormats.read(handed, ()).layout is CHECKPOINT_LAYOUTS["gptq"]
    assert StoredFormats.read({**handed, "format": "gptq_v2"}, ()).layout is CHECKPOINT_LAYOUTS["gptq_v2"]
    handed = {**AWQ, "quant_method": "auto-round", "packing_format": "auto_round:awq"}
    assert foreign_method(handed) == "awq"
    assert StoredFormats.read(handed, ()).layout is AWQ_GEMM
