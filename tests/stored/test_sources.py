"""Quantized models as input: a folder gives the same bytes as its twin of 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from auto_round.config import build_options
from auto_round.models.folder import FolderSource
from auto_round.pipeline.plan_run import dry_run
from pipeline.runs import ROWS, SHORT, quantize, weights
from stored.twins import Twins, fp8, in_blocks, make_twins, nibbles, powers, spread

BLOCK = (48, 32)
"""Rows and columns of FP8 blocks; 64 x 64 and 96 x 64 end in partial ones."""


def fp8_blocks(name, weight):
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True))
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            tile = weight[i * BLOCK[0] : (i + 1) * BLOCK[0], j * BLOCK[1] : (j + 1) * BLOCK[1]]
            scale[i, j] = tile.float().abs().max() / 448
    each = spread(scale, BLOCK, tuple(weight.shape))
    codes = fp8(weight, each)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * each


def fp8_powers(name, weight):
    scale = torch.full((1, 1), 2.0**-9)
    codes = fp8(weight, scale)
    stored = {name: codes, f"{name}_scale_inv": scale.to(torch.float8_e8m0fnu)}
    return stored, codes.float() * scale


def fp8_tensor(name, weight):
    scale = weight.float().abs().max() / 448
    codes = fp8(weight, scale)
    stored = {
        name: codes,
        f"{name}_scale": scale,
        f"{name.removesuffix('weight')}input_scale": torch.ones(()),
    }
    return stored, codes.float() * scale


def mx_experts(name, weight):
    """Stacks `[experts, in, out]` as `[experts, out, groups, 16]`."""
    matrices = weight.transpose(1, 2)
    scales, step = powers(matrices, 32, 6.0)
    codes, numbers = nibbles(matrices, step)
    stored = {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scales}
    return stored, numbers.transpose(1, 2)


def is_stack(name, weight):
    return weight.dim() == 3


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
CASES = {
    "fp8 blocks": ("llama", {**FP8, "weight_block_size": list(BLOCK)}, fp8_blocks, in_blocks),
    "fp8 blocks of experts": ("qwen3_moe", {**FP8, "weight_block_size": list(BLOCK)}, fp8_blocks, in_blocks),
    "fp8 powers": ("llama", {**FP8, "weight_block_size": [128, 128]}, fp8_powers, in_blocks),
    "fp8 tensor": ("llama", {"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor, in_blocks),
    "mxfp4 experts": ("gpt_oss", {"quant_method": "mxfp4"}, mx_experts, is_stack),
}


@pytest.fixture
def twins(plain_models, tmp_path):
    def make(name: str) -> Twins:
        family, config, pack, wanted = CASES[name]
        return make_twins(tmp_path, plain_models(family), config, pack, wanted)

    return make


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_those_of_the_plain_twin(twins, name):
    pair = twins(name)
    with FolderSource.open(pair.packed) as packed, FolderSource.open(pair.plain) as plain:
        assert dict(packed.tensors) == dict(plain.tensors)
        assert [layer.name for layer in packed.layers] == [layer.name for layer in plain.layers]
        for tensor in plain.tensors:
            assert torch.equal(packed.read_tensor(tensor), plain.read_tensor(tensor)), tensor


TUNED = ("fp8 blocks", "mxfp4 experts")


@pytest.mark.parametrize("name", TUNED)
def test_tuned_to_the_same_bytes_as_the_plain_twin(twins, tmp_path, name):
    pair = twins(name)
    outputs = [tmp_path / "from_packed", tmp_path / "from_plain"]
    for model, out in zip((pair.packed, pair.plain), outputs, strict=True):
        quantize(model, out, iters=1, nblocks=1, format="auto_round", verify=False)
    assert_same(*outputs)


def assert_same(one: Path, other: Path) -> None:
    """Weights bit for bit; configurations, but for the order of their keys, which is that of the disk."""
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert torch.equal(found[tensor].view(torch.uint8), value.view(torch.uint8)), tensor
    for file in ("config.json", "quantization_config.json"):
        if (other / file).is_file():
            assert json.loads((one / file).read_text()) == json.loads((other / file).read_text())


def test_plain_rounding_and_dry_runs_take_them_too(twins, tmp_path):
    pair = twins("fp8 blocks of experts")
    outputs = [tmp_path / "from_packed", tmp_path / "from_plain"]
    plans = []
    for model, out in zip((pair.packed, pair.plain), outputs, strict=True):
        given = {"iters": 0, "disable_opt_rtn": True, "format": "fake", "verify": False}
        options = build_options({**SHORT, "model": str(model), "output_dir": str(out), **given})
        plans.append(dry_run(options, dataset=ROWS).job.plan.to_json())
        quantize(model, out, **given)
    assert plans[0] == plans[1]
    assert_same(*outputs)
    assert "quantization_config" not in json.loads((outputs[0] / "config.json").read_text())
