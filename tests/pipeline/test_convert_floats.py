"""Conversion of floating numbers, and of what compressed-tensors holds: as one run writes both formats."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from auto_round.errors import UnsupportedError
from auto_round.pipeline.converting import convert
from pipeline.runs import quantize
from stored.makers import fp8_tiles, mx_experts
from stored.twins import in_blocks, make_twins

convert_folder = partial(convert.convert_folder, verify=False)
PLAIN = {"iters": 0, "disable_opt_rtn": True, "verify": False, "nsamples": 1}
BOTH = {
    "MXFP4": {"scheme": "MXFP4"},
    "MXFP6": {"scheme": "MXFP6"},
    "MXFP8": {"scheme": "MXFP8"},
    "NVFP4": {"scheme": "NVFP4", "group_size": 16},
    "NVFP4 weights": {"scheme": "NVFP4", "group_size": 16, "act_bits": 16},
    "FP8_STATIC": {"scheme": "FP8_STATIC", "group_size": -1},
    "W4A16": {"scale_dtype": "bfloat16"},
    "mixed": {
        "scheme": "MXFP4",
        "layer_config": {f"model.layers.{b}.mlp.down_proj": {"bits": 8} for b in range(2)},
        "ignore_layers": "k_proj",
    },
    "whole numbers in MXFP4": {
        "scheme": "MXFP4",
        "layer_config": {
            f"model.layers.{b}.mlp.down_proj": {
                "bits": 8,
                "data_type": "int",
                "act_bits": 16,
                "scale_dtype": "bfloat16",
            }
            for b in range(2)
        },
    },
}
"""Schemes that `auto_round` and `llm_compressor` both hold, of a model in bfloat16."""

TILES = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "g": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
        }
    },
}
"""FP8 in tiles that no preset has."""


def tensors(folder):
    return load_file(folder / "model.safetensors")


def said(folder):
    """What a configuration says of layers in any order, without facts of the run."""
    facts = {"iters", "nsamples", "seqlen", "batch_size", "not_use_best_mse", "disable_opt_rtn"}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {key: value for key, value in config.items() if key not in facts | {"config_groups", "ignore"}}
    for group in config.get("config_groups", {}).values():
        group["targets"].sort()
    groups = [json.dumps(group, sort_keys=True) for group in config.get("config_groups", {}).values()]
    return {**found, "ignore": sorted(config.get("ignore", ())), "groups": sorted(groups)}


@pytest.mark.parametrize("name", BOTH)
def test_both_ways_gives_what_the_run_wrote(tiny, tmp_path, name):
    formats = ["auto_round", "llm_compressor"]
    result = quantize(tiny("llama"), tmp_path / "out", format=",".join(formats), **{**PLAIN, **BOTH[name]})
    for source, wanted, form in zip(result.folders, reversed(result.folders), reversed(formats), strict=True):
        done = convert_folder(source, form, tmp_path / form)
        found, expected = tensors(done.folder), tensors(wanted)
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            assert found[tensor].dtype == value.dtype
            assert torch.equal(found[tensor].view(torch.uint8), value.view(torch.uint8)), tensor
        assert said(done.folder) == said(wanted)


def test_a_converted_folder_loads(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    result = quantize(tiny("llama"), tmp_path / "a", format="llm_compressor", scheme="MXFP4", **PLAIN)
    done = convert.convert_folder(result.folders[0], "auto_round", tmp_path / "b")
    assert done.verified == {"tokens": 1}


def test_what_a_format_cannot_say_is_refused(tiny, tmp_path):
    result = quantize(
        tiny("llama"), tmp_path / "a", format="llm_compressor", scheme="INT8", group_size=-1, **PLAIN
    )
    for target in ("auto_gptq", "auto_awq"):
        with pytest.raises(UnsupportedError, match="leave activations alone"):
            convert_folder(result.folders[0], target, tmp_path / "b")
    result = quantize(tiny("llama"), tmp_path / "c", format="auto_round", scheme="MXFP4", **PLAIN)
    for target, reason in (("auto_gptq", "whole numbers"), ("fake", "stores weights"), ("gguf:q4_0", "GGUF")):
        with pytest.raises(UnsupportedError, match=reason):
            convert_folder(result.folders[0], target, tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"]


def test_blocks_of_fp8(tiny, tmp_path):
    """Steps in float32 move where the model's dtype holds them, and are refused where it does not."""

    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}

    def one(exact):
        def pack(name, weight):
            scale = torch.full((1, 1), 2.0**-9 if exact else 0.0019)
            return {
                name: (weight.float() / scale).to(torch.float8_e4m3fn),
                f"{name}_scale_inv": scale,
            }, weight

        return make_twins(tmp_path / str(exact), tiny("llama"), config, pack, in_blocks).packed

    done = convert_folder(one(exact=True), "llm_compressor", tmp_path / "out")
    found, source = tensors(done.folder), tensors(tmp_path / "True" / "packed")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(found[f"{name}.weight"].view(torch.uint8), source[f"{name}.weight"].view(torch.uint8))
    assert found[f"{name}.weight_scale"].item() == 2.0**-9
    with pytest.raises(UnsupportedError, match="no numbers of bfloat16"):
        convert_folder(one(exact=False), "llm_compressor", tmp_path / "other")


@pytest.mark.parametrize(
    ("family", "config", "pack", "reason"),
    [
        (
            "llama",
            TILES,
            fp8_tiles,
            "no scheme describes",
        ),
        ("gpt_oss", {"quant_method": "mxfp4"}, mx_experts, "no stacks of experts"),
    ],
)
def test_what_no_scheme_describes_is_refused(tiny, tmp_path, family, config, pack, reason):
    wanted = in_blocks if family == "llama" else lambda name, weight: weight.dim() == 3
    folder = make_twins(tmp_path, tiny(family), config, pack, wanted).packed
    with pytest.raises(UnsupportedError, match=reason):
        convert_folder(folder, "llm_compressor", tmp_path / "out")
