"""Numbers that a type, a format or the data cannot give: refused before a weight is read, with a way out."""

from __future__ import annotations

import pytest
import torch

from auto_round.config import build_options
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.models.folder import FolderSource
from auto_round.pipeline.deciding.prepare import prepare
from pipeline.runs import ROWS, SHORT

PLAIN = {"iters": 0, "disable_opt_rtn": True}
NONE = {"group_size": None}
INT8_STATIC = {"scheme": "INT8_W8A8", "act_dynamic": False, "act_group_size": 0, **NONE}
A8 = {"scheme": "W4A16", "act_bits": 8, "act_group_size": -1}


def q_proj(scheme=None, **fields):
    """One kind of layer apart from the others."""
    return {"layer_config": {"q_proj": scheme or fields}}


@pytest.fixture(autouse=True)
def _no_weight_is_read(monkeypatch):
    def read(*given):
        pytest.fail("a weight was read")

    monkeypatch.setattr(FolderSource, "read_tensor", read)


def refused(tiny, given, family="llama", **sizes):
    """What is said, as one line."""
    data = None if isinstance(given.get("dataset"), str) else given.get("dataset", ROWS)
    own = {name: value for name, value in given.items() if name != "dataset" or data is None}
    options = build_options({**SHORT, "model": str(tiny(family, **sizes)), "output_dir": "out", **own})
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        prepare(options, dataset=data)
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("given", "reason", "instead"),
    [
        ({"scheme": "MXFP4", "group_size": 64}, "groups of 32, not of 64", "group_size 32"),
        ({"scheme": "MXFP8", "group_size": 16}, "groups of 32, not of 16", "group_size 32"),
        ({"scheme": "MXINT4", "group_size": 128}, "groups of 32, not of 128", "group_size 32"),
        ({"scheme": "NVFP4", "group_size": 32}, "groups of 16, not of 32", "group_size 16"),
        ({"scheme": "NVFP4", "group_size": -1}, "groups of 16, not of -1", "group_size 16"),
        ({"scheme": "NVFP4_E5M3", "group_size": 32}, "groups of 16, not of 32", "group_size 16"),
        ({"scheme": "FP8_BLOCK", "group_size": 64}, "groups of 128, not of 64", "group_size 128"),
        ({"scheme": "MXFP4", "act_group_size": 64, **NONE}, "groups of 32, not of 64", "act_group_size 32"),
        ({"scheme": "NVFP4", "act_group_size": 8, **NONE}, "groups of 16, not of 8", "act_group_size 16"),
        ({"scheme": "W4A16", "act_bits": 8}, "groups of 32", "act_group_size -1"),
        ({**INT8_STATIC, "act_group_size": -1}, "one for the whole tensor", "act_group_size 0"),
        ({"layer_config": {"q_proj": {"data_type": "mx_fp4", "group_size": 64}}}, "not of 64", "32"),
        ({"scheme": "W4A16", "group_size": 48}, "64 is no multiple of 48", "--group_size 64"),
        ({"format": "auto_awq", "group_size": 0}, "group_size 0", "group_size -1"),
        ({"format": "auto_gptq", "group_size": 0}, "group_size 0", "group_size -1"),
    ],
    ids=str,
)
def test_group_sizes(tiny, given, reason, instead):
    text = refused(tiny, given)
    assert reason in text
    assert instead in text.partition(reason)[2]
    assert len(text) < 600  # other schemes are no help


@pytest.mark.parametrize(
    ("given", "who", "instead"),
    [
        ({**A8, "format": "auto_gptq"}, "auto_gptq", "llm_compressor, fake"),
        ({**A8, "format": "gptqmodel"}, "gptqmodel", "llm_compressor, fake"),
        ({**A8, "format": "auto_awq"}, "auto_awq", "llm_compressor, fake"),
        ({**A8, "format": "auto_round"}, "auto_round", "llm_compressor, fake"),
        ({**A8, "format": "auto_gptq", "act_data_type": "fp"}, "auto_gptq", "llm_compressor, fake"),
        ({"scheme": "INT8", "format": "auto_gptq", **NONE}, "auto_gptq", "llm_compressor, fake"),
        ({"scheme": "MXFP4", "format": "auto_gptq", **NONE}, "auto_gptq", "auto_round"),
        ({**A8, "format": "gguf:q4_k_m"}, "gguf", "act_bits"),
        ({**INT8_STATIC, "format": "auto_awq"}, "auto_awq", "llm_compressor, fake"),
    ],
    ids=str,
)
def test_activations_beside_weights_alone(tiny, given, who, instead):
    text = refused(tiny, given)
    assert who in text
    assert instead in text


def test_activations_without_weights(tiny):
    assert "give bits of 2 to 8 too" in refused(tiny, {"bits": 16, "act_bits": 8})


@pytest.mark.parametrize(
    ("given", "reason", "instead"),
    [
        (
            {"format": "auto_awq", "layer_config": {"q_proj": {"bits": 8}}},
            "codes of 4 bits, not 8",
            "auto_round",
        ),
        (
            {"format": "auto_awq", "layer_config": {"q_proj": {"group_size": 64}}},
            "one group size",
            "auto_round",
        ),
        (
            {"format": "auto_gptq", "layer_config": {"q_proj": "MXFP4"}},
            "whole numbers, not mxfp4",
            "llm_compressor",
        ),
        (
            {"format": "auto_round:auto_gptq", "layer_config": {"q_proj": "NVFP4"}},
            "whole numbers, not nvfp4",
            "llm_compressor",
        ),
        (
            {"format": "llm_compressor", "layer_config": {"q_proj": {"sym": False}}},
            "no zero points beside other schemes",
            "auto_round",
        ),
        ({"format": "gguf:q4_k_m", "layer_config": {"q_proj": "MXFP8"}}, "no GGUF type", "GGUF:Q4_K"),
        ({"format": "gguf:q4_k_m,auto_gptq"}, "a plan of its own", "fake"),
        ({"format": "auto_round:fp8", "scheme": "FP8_STATIC", **NONE}, "no scales of inputs", "fp8_static"),
        (
            {"format": "auto_round:fp8_static", "scheme": "FPW8A16", **NONE},
            "one scale that calibration",
            "fp8",
        ),
        ({"format": "llm_compressor", "scheme": "MXINT4", **NONE}, "no weights of data_type", "fake"),
    ],
    ids=str,
)
def test_plans_that_a_format_cannot_express(tiny, given, reason, instead):
    text = refused(tiny, {"sym": True, **given})
    assert reason in text
    assert instead in text


@pytest.mark.parametrize("given", [{}, PLAIN], ids=["tuned", "plain"])
@pytest.mark.parametrize(
    "scheme",
    [
        {"scheme": "FP8_STATIC", **NONE},
        {"scheme": "NVFP4", **NONE},
        {**INT8_STATIC, "format": "llm_compressor"},
        {**INT8_STATIC, "format": "llm_compressor", "act_sym": False},
    ],
    ids=str,
)
def test_inputs_that_nothing_is_known_of(tiny, scheme, given):
    """A number that calibration fixes needs rows, however weights are rounded."""
    text = refused(tiny, {**scheme, **given, "dataset": []})
    assert "no calibration row" in text
    assert "Give more data" in text
    assert "no such file" in refused(tiny, {**scheme, **given, "dataset": "no-such.jsonl"})


def test_inputs_outside_of_the_blocks_have_no_statistics(tiny):
    text = refused(tiny, {"scheme": "FP8_STATIC", "quant_lm_head": True, **NONE})
    assert "lm_head lies outside of the blocks" in text
    assert '"act_bits": 16' in text


def test_dtypes_that_readers_would_change(tiny):
    text = refused(tiny, {"scheme": "MXFP4", "format": "llm_compressor", **NONE}, dtype=torch.float32)
    assert "bfloat16" in text
    assert "fake" in text
