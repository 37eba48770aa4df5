"""Dtypes in which a model's tensors are, and its blocks run, when it computes in another than its own."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import LlamaForCausalLM

from auto_round.errors import UnsupportedError
from auto_round.inference.load_folder import unpacked_to
from auto_round.models.auto_classes import load_model
from auto_round.models.earlier_results import untraceable
from auto_round.models.folder import FolderSource
from auto_round.models.live import LiveSource
from auto_round.models.rehearsal import Rehearsed, widened
from auto_round.models.skeleton import build_skeleton, weight_dtypes
from sweep.configurations import family_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NARROW = torch.bfloat16
FAMILIES = {
    "openai-gpt": "a mask that is made in the model's dtype",
    "xglm": "positions that are",
    "codegen": "positions that stay in float32",
    "deepseek_v3": "routers that do",
}


def dtypes(module):
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.dtype for name, tensor in tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_have_the_dtypes_of_a_model_that_is_loaded_so(saved_family, family):
    """Blocks and stem, whether the float32 model lies in a folder or in memory."""
    folder = saved_family(family)
    loaded = load_model(folder, trust_remote_code=False, dtype=NARROW)
    expected = dtypes(loaded)
    with FolderSource.open(folder) as source:
        assert source.dtype == torch.float32
        for each in (source, LiveSource(load_model(folder, trust_remote_code=False))):
            path = each.blocks[1].module
            stubs = tuple(block.module for block in each.blocks)
            with each.block(1, dtype=NARROW) as block, each.stem(dtype=NARROW) as stem:
                found = {f"{path}.{name}": dtype for name, dtype in dtypes(block).items()}
                outside = {n: d for n, d in dtypes(stem.model).items() if not n.startswith(stubs)}
                found |= outside
            assert outside
            assert {name: expected[name] for name in found} == found


def test_a_model_put_into_another_dtype_has_the_buffers_of_one_that_is_loaded_so(saved_family):
    """As the check of a folder does that compressed-tensors unpacks in the folder's own dtype."""
    model = load_model(saved_family("xglm"), trust_remote_code=False)
    unpacked_to(model, NARROW)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    assert logits.dtype == NARROW


def test_blocks_whose_code_mixes_dtypes_run_in_float32(saved_family, caplog):
    with FolderSource.open(saved_family("xlstm")) as source, caplog.at_level(logging.INFO, "auto_round"):
        assert source.refuse_untraceable().dtype == torch.float32
        assert not caplog.messages
        assert source.refuse_untraceable(dtype=NARROW).dtype == torch.float32
    assert "blocks run in float32" in caplog.text
    assert "same dtype" in caplog.text


def test_other_blocks_run_as_is_asked(saved_family):
    for family in ("openai-gpt", "xglm"):
        with FolderSource.open(saved_family(family)) as source:
            assert source.refuse_untraceable(dtype=NARROW).dtype == NARROW


MIXED, ABSENT = RuntimeError("mixed"), NotImplementedError("no such operator")


@pytest.mark.parametrize(
    ("narrow", "wide", "device", "dtype"),
    [
        ({}, {}, CPU, NARROW),
        ({0: MIXED}, {}, CPU, torch.float32),
        ({0: MIXED}, {0: MIXED}, CPU, NARROW),  # which wants weights
        ({0: MIXED, 1: MIXED}, {0: MIXED}, CPU, torch.float32),
        ({0: ABSENT}, {}, CPU, torch.float32),
        ({0: ABSENT}, {}, CUDA, NARROW),
        ({0: MIXED}, None, CPU, NARROW),
        (None, {}, CPU, torch.float32),
    ],
)
def test_float32_is_taken_where_it_lets_blocks_run(narrow, wide, device, dtype):
    def rehearse(asked):
        failed = narrow if asked == NARROW else wide
        if failed is None:
            raise untraceable("the model around its blocks fails")
        return Rehearsed(frozenset(), failed)

    assert widened(rehearse, NARROW, device).dtype == dtype


def test_what_is_refused_in_float32_too_is_refused():
    def rehearse(asked: torch.dtype) -> Rehearsed:
        raise untraceable(f"it fails in {asked}".replace(".", " "))

    with pytest.raises(UnsupportedError, match="it fails in torch float32"):
        widened(rehearse, NARROW, CPU)


def test_weights_that_are_not_float32_need_no_second_model(monkeypatch):
    model = build_skeleton(family_config("llama"), NARROW)
    monkeypatch.setattr("auto_round.models.skeleton.dtypes_when_built", None)
    assert weight_dtypes(model, torch.float32)["lm_head.weight"] == torch.float32
    assert weight_dtypes(model, NARROW)["lm_head.weight"] == NARROW


def test_a_class_that_is_not_built_of_a_configuration_alone():
    class Named(LlamaForCausalLM):
        def __init__(self, config, name):
            super().__init__(config)
            self.name = name

    source = LiveSource(Named(family_config("llama"), "mine").eval())
    with source.block(0, dtype=NARROW) as block:
        assert set(dtypes(block).values()) == {NARROW}
