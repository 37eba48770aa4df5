"""compressed-tensors folders of other tools as input; what is stored is made with plain PyTorch."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import CheckpointError, ConfigError, UnsupportedError
from auto_round.models.folder import FolderSource
from stored.twins import fp8, in_blocks, make_twins, nibbles, powers

LINEAR = {"targets": ["Linear"]}


def group(form, /, **weights):
    said = {"weights": {"symmetric": True, "dynamic": False, **weights}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": LINEAR | said}}


def layer_of(name):
    return name.removesuffix(".weight")


def fp8_rows(name, weight):
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = fp8(weight, scale.float())
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale.float()


def fp8_whole(name, weight):
    """One scale without axes, and one of the inputs, as older releases wrote them."""
    scale = weight.float().abs().max() / 448
    codes = fp8(weight, scale)
    return {
        name: codes,
        f"{name}_scale": scale,
        f"{layer_of(name)}.input_scale": torch.ones(1),
    }, codes.float() * scale


def fp8_tiles(name, weight):
    """Tiles of 64 x 32, which no preset has."""
    tiles = weight.float().unflatten(0, (-1, 32)).unflatten(-1, (-1, 32))
    scale = tiles.abs().amax((1, 3)) / 448
    each = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    codes = fp8(weight, each)
    return {name: codes, f"{name}_scale": scale}, codes.float() * each


def int8_rows(name, weight):
    scale = (weight.float().abs().amax(1, keepdim=True) / 127.5).to(torch.bfloat16)
    codes = (weight.float() / scale.float()).round().clamp(-128, 127)
    return {name: codes.to(torch.int8), f"{name}_scale": scale}, codes * scale.float()


def words(codes, bits=4):
    """Codes of 4 bits from -8 on, eight in a word, the first in the lowest bits."""
    lanes = (codes + 8).to(torch.int64).unflatten(-1, (-1, 32 // bits))
    packed = sum(lanes[..., i] << (bits * i) for i in range(32 // bits))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def int4_groups(name, weight):
    """Beside symmetric weights older releases wrote zero points of 0."""
    grouped = weight.float().unflatten(-1, (-1, 32))
    scale = (grouped.abs().amax(-1) / 7.5).to(torch.bfloat16)
    codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(-8, 7)
    stored = {
        "weight_packed": words(codes.flatten(1)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
        "weight_zero_point": torch.zeros(weight.shape[0], weight.shape[1] // 32, dtype=torch.int8),
    }
    return named(name, stored), (codes * scale.float().unsqueeze(-1)).flatten(1)


def int4_reordered(name, weight):
    """Groups of inputs that are not neighbours."""
    generator = torch.Generator().manual_seed(weight.shape[1])
    order = torch.randperm(weight.shape[1], generator=generator)
    stored, dequantized = int4_groups(name, weight[:, order])
    back = torch.argsort(order)
    codes = stored[f"{layer_of(name)}.weight_packed"]
    lanes = torch.stack([(codes >> (4 * i)) & 15 for i in range(8)], -1).flatten(1)[:, back] - 8
    stored |= named(name, {"weight_packed": words(lanes), "weight_g_idx": (back // 32).to(torch.int32)})
    return stored, dequantized[:, back]


def mxfp4(name, weight):
    scale, step = powers(weight, 32, 6.0)
    codes, numbers = nibbles(weight, step)
    return named(name, {"weight_packed": codes, "weight_scale": scale}), numbers


def nvfp4(name, weight):
    over = 448 * 6 / weight.float().abs().max()
    scale = (weight.float().unflatten(-1, (-1, 16)).abs().amax(-1) / 6 * over).to(torch.float8_e4m3fn)
    step = (scale.float() / over).repeat_interleave(16, -1)
    codes, numbers = nibbles(weight, step)
    stored = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": over.reshape(1)}
    return named(name, {**stored, "input_global_scale": torch.ones(1)}), numbers


def named(name, stored):
    return {f"{layer_of(name)}.{suffix}": tensor for suffix, tensor in stored.items()}


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
