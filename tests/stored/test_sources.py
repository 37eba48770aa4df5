"""Quantized models as input: a folder gives the same bytes as its twin of 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.config import build_options
from auto_round.errors import CheckpointError
from auto_round.models.folder import FolderSource
from auto_round.pipeline.dry_run import dry_run
from auto_round.stored import packed
from pipeline.runs import ROWS, SHORT, quantize, weights
from stored.makers import BLOCK, fp8_blocks, fp8_powers, fp8_rows, fp8_tensor, gptq_reordered, mx_experts
from stored.twins import Twins, in_blocks, make_twins


def is_stack(name, weight):
    return weight.dim() == 3


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
CASES = {
    "fp8 blocks": ("llama", {**FP8, "weight_block_size": list(BLOCK)}, fp8_blocks, in_blocks),
    "fp8 blocks of experts": ("qwen3_moe", {**FP8, "weight_block_size": list(BLOCK)}, fp8_blocks, in_blocks),
    "fp8 powers": ("llama", {**FP8, "weight_block_size": [128, 128]}, fp8_powers, in_blocks),
    "fp8 tensor": ("llama", {"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor, in_blocks),
    "fp8 blocks of DeepSeek": (
        "deepseek_v3",
        {**FP8, "weight_block_size": list(BLOCK)},
        fp8_blocks,
        in_blocks,
    ),
    "fp8 rows": ("llama", {"quant_method": "fbgemm_fp8"}, fp8_rows, in_blocks),
    "gptq, reordered": (
        "llama",
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
        gptq_reordered,
        in_blocks,
    ),
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
    with FolderSource.open(pair.packed) as found, FolderSource.open(pair.plain) as plain:
        assert dict(found.tensors) == dict(plain.tensors)
        assert [layer.name for layer in found.layers] == [layer.name for layer in plain.layers]
        for tensor in plain.tensors:
            assert torch.equal(found.read_tensor(tensor), plain.read_tensor(tensor)), tensor


@pytest.mark.parametrize("name", ["fp8 blocks", "fp8 powers", "fp8 tensor", "fp8 rows"])
def test_some_rows_at_a_time(twins, monkeypatch, name):
    """Bands of 48 rows: the blocks' own, and no divisor of the others'."""
    monkeypatch.setattr(packed, "BAND", 48 * 64)
    test_tensors_are_those_of_the_plain_twin(twins, name)


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


def test_blocks_for_predicting_more_tokens_are_unpacked_too(twins):
    """Tensors without a module are copied; a plain output has no use for codes."""
    pair = twins("fp8 blocks of DeepSeek")
    for folder in (pair.packed, pair.plain):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        extra = {n: t for n, t in tensors.items() if n.startswith("model.layers.1.self_attn.o_proj")}
        save_file({**tensors, **{n.replace(".1.", ".2."): t.clone() for n, t in extra.items()}}, path)
    with FolderSource.open(pair.packed) as found, FolderSource.open(pair.plain) as plain:
        name = "model.layers.2.self_attn.o_proj.weight"
        assert dict(found.tensors) == dict(plain.tensors)
        assert torch.equal(found.read_tensor(name), plain.read_tensor(name))


def test_fp8_without_scales(twins):
    folder = twins("fp8 blocks").packed
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*is FP8"):
        FolderSource.open(folder)


def test_what_older_tools_said_beside_the_configuration(twins):
    pair = twins("gptq, reordered")
    path = pair.packed / "config.json"
    said = json.loads(path.read_text())
    older = said.pop("quantization_config")
    del older["quant_method"]
    path.write_text(json.dumps(said))
    (pair.packed / "quantize_config.json").write_text(json.dumps(older))
    name = "model.layers.1.mlp.down_proj.weight"
    with FolderSource.open(pair.packed) as found, FolderSource.open(pair.plain) as plain:
        assert torch.equal(found.read_tensor(name), plain.read_tensor(name))


def test_the_user_is_told(twins, caplog):
    with FolderSource.open(twins("fp8 rows").packed):
        assert "is quantized already (fbgemm_fp8)" in caplog.text
