"""A model in memory is served and stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from auto_round.errors import ConfigError
from auto_round.models.live import LiveSource
from auto_round.testing.tiny_models import tiny_config, tiny_model

IDS = torch.arange(3, 15).reshape(2, 6)


def everything(model):
    """Every attribute of every module, by identity, and every value."""
    attributes = {(n, k): id(v) for n, m in model.named_modules() for k, v in m.__dict__.items()}
    return attributes, {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "qwen3_moe"])
def test_the_model_is_not_touched(family):
    model = tiny_model(tiny_config(family))
    attributes, values = everything(model)
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits
        source = LiveSource(model)
        with source.stem() as stem:
            trace = stem.trace({"input_ids": IDS})
            hidden = trace.states[0]
            for block in source.blocks:
                with source.block(block.index) as module:
                    hidden = module(hidden, **trace.calls[block.index].kwargs)
                    for weight in module.parameters():
                        weight.zero_()
            logits = stem.finish(hidden)
        for name in source.tensors:
            source.read_tensor(name).zero_()
    assert torch.equal(logits, before)
    after_attributes, after_values = everything(model)
    assert after_attributes == attributes
    for name, (pointer, value) in values.items():
        assert after_values[name][0] == pointer
        assert torch.equal(after_values[name][1], value)


def test_a_model_in_training_mode_stays_in_it():
    model = tiny_model(tiny_config("llama")).train()
    with LiveSource(model).block(0) as module:
        assert not module.training
    assert model.training


def test_untied_by_the_user():
    model = tiny_model(tiny_config("qwen2"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    source = LiveSource(model)
    assert not source.tied_head
    assert torch.equal(source.read(source.layers[-1]), model.lm_head.weight)
    with source.stem() as stem, torch.no_grad():
        hidden = stem.trace({"input_ids": IDS}).states[0]
        assert torch.equal(stem.finish(hidden), model.lm_head(stem.finish_inputs(hidden)))


def test_a_model_that_is_not_loaded():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ConfigError, match=r"21 weights.*embed_tokens"):
        LiveSource(model)


def test_not_a_transformers_model():
    with pytest.raises(ConfigError, match="quantize_block"):
        LiveSource(nn.Linear(2, 2))
