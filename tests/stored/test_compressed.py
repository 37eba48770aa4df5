"""compressed-tensors folders of other tools as input; what is stored is made with plain PyTorch."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import CheckpointError, ConfigError, UnsupportedError
from auto_round.models.folder import FolderSource
from auto_round.stored import packed as packed_module
from pipeline.runs import quantize, weights
from stored.makers import fp8_rows, fp8_tiles, fp8_whole, int4_groups, int4_reordered, int8_rows, mxfp4, nvfp4
from stored.twins import in_blocks, make_twins

LINEAR = {"targets": ["Linear"]}


def group(form, /, **weights):
    said = {"weights": {"symmetric": True, "dynamic": False, **weights}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": LINEAR | said}}


CASES = {
    "fp8 rows": (group("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_rows),
    "fp8 tensor": (group("naive-quantized", num_bits=8, type="float", strategy="tensor"), fp8_whole),
    "fp8 tiles": (
        group("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
        fp8_tiles,
    ),
    "int8 rows": (group("int-quantized", num_bits=8, type="int", strategy="channel"), int8_rows),
    "int8 rows, naive": (group("naive-quantized", num_bits=8, type="int", strategy="channel"), int8_rows),
    "int4": (group("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32), int4_groups),
    "int4, reordered": (
        group("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, actorder="group"),
        int4_reordered,
    ),
    "mxfp4": (
        group("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        mxfp4,
    ),
    "nvfp4": (
        group("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_those_of_the_plain_twin(plain_models, tmp_path, name):
    config, pack = CASES[name]
    pair = make_twins(tmp_path, plain_models("llama"), config, pack, in_blocks)
    with FolderSource.open(pair.packed) as packed, FolderSource.open(pair.plain) as plain:
        assert dict(packed.tensors) == dict(plain.tensors)
        for tensor in plain.tensors:
            assert torch.equal(packed.read_tensor(tensor), plain.read_tensor(tensor)), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8 rows", "fp8 tiles", "int8 rows", "int4", "mxfp4", "nvfp4"])
def test_tuned_to_the_same_bytes_as_the_plain_twin(plain_models, tmp_path, name):
    config, pack = CASES[name]
    pair = make_twins(tmp_path, plain_models("llama"), config, pack, in_blocks)
    found, wanted = (
        weights(
            quantize(model, tmp_path / f"from_{model.name}", scheme="W4A16", iters=1, verify=False).folders[0]
        )
        for model in (pair.packed, pair.plain)
    )
    assert found.keys() == wanted.keys()
    for tensor, value in wanted.items():
        assert torch.equal(found[tensor].view(torch.uint8), value.view(torch.uint8)), tensor


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8 tiles"])
def test_some_rows_at_a_time(plain_models, tmp_path, monkeypatch, name):
    monkeypatch.setattr(packed_module, "BAND", 48 * 64)
    test_tensors_are_those_of_the_plain_twin(plain_models, tmp_path, name)


def test_several_groups(plain_models, tmp_path):
    """Names before expressions before classes; scales of caches and of attention are left out."""
    parts = {
        "class": ("fp8 rows", ["Linear"]),
        "expression": ("int4", ["re:.*self_attn.*"]),
        "name": ("mxfp4", ["model.layers.0.self_attn.q_proj"]),
    }
    groups = {
        key: {
            **CASES[case][0]["config_groups"]["group_0"],
            "targets": targets,
            "format": CASES[case][0]["format"],
        }
        for key, (case, targets) in parts.items()
    }
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}

    def pack(name, weight):
        if name.endswith("0.self_attn.q_proj.weight"):
            stored, plain = mxfp4(name, weight)
            return {**stored, "model.layers.0.self_attn.k_scale": torch.ones(1)}, plain
        return (int4_groups if "self_attn" in name else fp8_rows)(name, weight)

    pair = make_twins(tmp_path, plain_models("llama"), config, pack, in_blocks)
    with FolderSource.open(pair.packed) as packed, FolderSource.open(pair.plain) as plain:
        assert dict(packed.tensors) == dict(plain.tensors)
        for tensor in plain.tensors:
            assert torch.equal(packed.read_tensor(tensor), plain.read_tensor(tensor)), tensor


@pytest.mark.parametrize("key", ["compression_config", "quantization_config"])
def test_older_key_and_nested_configuration(plain_models, tmp_path, key):
    config, pack = CASES["fp8 rows"]
    pair = make_twins(tmp_path, plain_models("llama"), config, pack, in_blocks)
    path = pair.packed / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, key: said.pop("quantization_config")}))
    with FolderSource.open(pair.packed) as packed:
        assert all(spec.dtype is torch.bfloat16 for spec in packed.tensors.values())


@pytest.fixture
def packed_folder(plain_models, tmp_path):
    config, pack = CASES["fp8 rows"]
    return make_twins(tmp_path, plain_models("llama"), config, pack, in_blocks).packed


def changed(folder, **quantization):
    path = folder / "config.json"
    said = json.loads(path.read_text())
    said["quantization_config"] |= quantization
    path.write_text(json.dumps(said))
    return folder


def test_sparse_weights_are_refused(packed_folder):
    with pytest.raises(UnsupportedError, match="sparse"):
        FolderSource.open(changed(packed_folder, sparsity_config={"format": "sparse-24-bitmask"}))


def test_without_groups(packed_folder):
    with pytest.raises(ConfigError, match="config_groups"):
        FolderSource.open(changed(packed_folder, config_groups=None))


def test_numbers_that_are_not_known_are_named(packed_folder):
    groups = {"g": LINEAR | {"weights": {"num_bits": 5, "type": "float", "strategy": "channel"}}}
    with pytest.raises(UnsupportedError, match="num_bits 5, type float"):
        FolderSource.open(changed(packed_folder, config_groups=groups))


def test_targets_that_are_no_expressions(packed_folder):
    groups = {"g": {"targets": ["re:("], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}
    with pytest.raises(ConfigError, match="regular expression"):
        FolderSource.open(changed(packed_folder, config_groups=groups))


def test_a_layer_without_a_group(packed_folder):
    groups = {
        "g": {"targets": ["lm_head"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    }
    with pytest.raises(CheckpointError, match="no config group"):
        FolderSource.open(changed(packed_folder, config_groups=groups))


def test_scales_of_another_shape(packed_folder):
    weights = load_file(packed_folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    weights[name] = weights[name][1:].contiguous()
    save_file(weights, packed_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="up_proj"):
        FolderSource.open(packed_folder)
