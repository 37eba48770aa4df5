"""Folders of this package as input, in every packing: the `fake` folder of the same run is the twin."""

from __future__ import annotations

import pytest
import torch

from auto_round.models.folder import FolderSource
from auto_round.testing.tiny_models import save_tiny_model
from pipeline.runs import quantize

EXPERTS = ("auto_round", "auto_gptq", "llm_compressor MXFP4")
"""Cases with a mixture of experts, whose matrices lie on disk one by one; the others are dense."""
WHOLE = {
    "auto_round": {},
    "auto_round, zero points": {"sym": False, "bits": 3},
    "auto_round:auto_awq": {"sym": False},
    "auto_round, mixed": {"layer_config": {"q_proj": {"bits": 8, "group_size": 64}}},
    "auto_gptq": {"sym": False},
    "gptqmodel": {"bits": 2},
    "auto_awq": {"sym": False},
    "llm_compressor": {"bits": 3, "scale_dtype": "float16"},
    "llm_compressor, zero points": {"sym": False, "scale_dtype": "float16"},
    "llm_compressor, W8A8": {"scheme": "INT8", "group_size": -1},
}
"""Schemes of whole numbers, stored from models in float16."""
FLOATS = {
    "auto_round MXFP4": {"scheme": "MXFP4"},
    "auto_round MXFP6": {"scheme": "MXFP6"},
    "auto_round MXFP8": {"scheme": "MXFP8"},
    "auto_round NVFP4": {"scheme": "NVFP4", "group_size": 16, "act_bits": 16},
    "auto_round NVFP4, inputs calibrated": {"scheme": "NVFP4", "group_size": 16},
    "auto_round FP8_STATIC": {"scheme": "FP8_STATIC", "group_size": -1},
    "auto_round FPW8A16": {"scheme": "FPW8A16", "group_size": 0},
    "auto_round FP8": {"data_type": "fp", "bits": 8, "group_size": -1, "scale_dtype": "bfloat16"},
    "auto_round MXFP4 and whole numbers": {
        "scheme": "MXFP4",
        "layer_config": {"mlp": {"bits": 4, "data_type": "int", "act_bits": 16}},
    },
    "llm_compressor MXFP4": {"scheme": "MXFP4", "act_bits": 16},
    "llm_compressor MXFP6": {"scheme": "MXFP6"},
    "llm_compressor MXFP8": {"scheme": "MXFP8"},
    "llm_compressor NVFP4": {"scheme": "NVFP4", "group_size": 16},
    "llm_compressor FPW8A16": {"scheme": "FPW8A16", "group_size": 0},
    "llm_compressor FP8_STATIC": {"scheme": "FP8_STATIC", "group_size": -1},
    "llm_compressor FP8_BLOCK": {"scheme": "FP8_BLOCK", "group_size": 128, "ignore_layers": "k_proj,v_proj"},
}
"""Schemes of floating numbers, stored from models in bfloat16."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    def get(family, dtype, width=64):
        key = family, dtype, width
        if key not in made:
            sizes = {"hidden_size": width, "intermediate_size": 2 * width, "moe_intermediate_size": width}
            folder = tmp_path_factory.mktemp(family)
            made[key] = save_tiny_model(family, folder, dtype=dtype, head_dim=width // 4, **sizes)
        return made[key]

    made = {}
    return get


@pytest.mark.parametrize("name", [*WHOLE, *FLOATS])
def test_tensors_are_those_of_the_fake_folder(models, tmp_path, name):
    dtype = torch.float16 if name in WHOLE else torch.bfloat16
    width = 128 if name.endswith("FP8_BLOCK") else 64
    model = models("qwen3_moe" if name in EXPERTS else "llama", dtype, width)
    form = name.replace(",", " ").split()[0]
    rounding = {"iters": 0, "disable_opt_rtn": True, "verify": False, "nsamples": 1}
    given = {**rounding, **WHOLE.get(name, {}), **FLOATS.get(name, {})}
    result = quantize(model, tmp_path / "out", format=f"{form},fake", **given)
    packed, fake = (FolderSource.open(folder) for folder in result.folders)
    with packed, fake:
        assert dict(packed.tensors) == dict(fake.tensors)
        for tensor in fake.tensors:
            assert torch.equal(packed.read_tensor(tensor), fake.read_tensor(tensor)), tensor
