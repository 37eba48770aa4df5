"""What scripts read of an `AutoRound`, before a run and after it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round import AutoRound, QuantizationScheme
from auto_round.config import argument_names
from auto_round.testing.tiny_models import tiny_tokenizer
from export.gguf.small_models import save_small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model("qwen3", tmp_path_factory.mktemp("model") / "tiny")


ROWS = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1)).tolist()


def quantizer(model, **named):
    settings = {"group_size": 32, "seqlen": 16, "nsamples": 2, "iters": 0, "dataset": ROWS}
    return AutoRound(model, **{**settings, **named})


def test_every_argument_is_read_by_its_name_and_cannot_be_set(folder):
    ar = quantizer(folder, bs=2, scheme="W2A16", sym=False, layer_config={"k_proj": {"bits": 8}})
    wanted = {"bits": 2, "group_size": 32, "sym": False, "data_type": "int", "act_bits": 16, "iters": 0}
    wanted |= {
        "batch_size": 2,
        "bs": 2,
        "train_bs": 2,
        "seqlen": 16,
        "lr": None,
        "scheme": "W2A16",
        "amp": True,
    }
    assert {name: getattr(ar, name) for name in wanted} == wanted
    assert ar.layer_config == {"k_proj": {"bits": 8}}
    for name, (_, opposite) in argument_names().items():
        if not opposite and name not in ("model", "tokenizer"):
            getattr(ar, name)
            assert name in dir(ar)
            with pytest.raises(AttributeError, match=r"argument|layer_config"):
                setattr(ar, name, 1)
    assert ar.bits == 2
    with pytest.raises(AttributeError, match="no attribute 'bit'"):
        _ = ar.bit


@pytest.mark.parametrize(
    ("scheme", "bits"), [("W4A16", 4), ("w3a16", 3), ({"bits": 8}, 8), (QuantizationScheme(bits=2), 2)]
)
def test_fields_tell_the_scheme_that_is_in_force(scheme, bits):
    assert AutoRound("no/model", scheme=scheme).bits == bits
    assert AutoRound("no/model", scheme=scheme, bits=4).bits == 4


def test_model_and_tokenizer_come_from_the_folder(folder):
    ar = quantizer(folder)
    model = ar.model
    assert ar.model is model, "as long as somebody holds it"
    assert model.model.layers[0].mlp.up_proj.weight.shape == (96, 64)
    assert ar.tokenizer("ab")["input_ids"]
    live = AutoModelForCausalLM.from_pretrained(folder)
    words = tiny_tokenizer()
    ar = quantizer(live, tokenizer=words)
    assert ar.model is live
    assert ar.tokenizer is words
    assert quantizer(live).tokenizer is None


def test_after_quantize_they_tell_what_came_of_it(folder):
    rules = {"layers.0.self_attn": {"bits": 2}, "layers.1.mlp.up_proj": "W2A16G64", "down_proj": {"bits": 16}}
    ar = quantizer(folder, scheme="W4A16", layer_config=rules)
    model, schemes = ar.quantize()
    assert ar.model is model
    assert ar.layer_config["model.layers.0.self_attn.v_proj"]["bits"] == 2
    assert ar.layer_config["model.layers.1.mlp.up_proj"]["group_size"] == 64
    assert ar.layer_config["model.layers.1.mlp.down_proj"]["bits"] == 16
    assert ar.layer_config["lm_head"]["bits"] == 16
    assert {n: s for n, s in ar.layer_config.items() if s["bits"] < 16} == schemes
    layers = ar.model.model.layers
    assert [layers[i].self_attn.q_proj.bits for i in (0, 1)] == [2, 4]
    assert [layers[i].mlp.up_proj.group_size for i in (0, 1)] == [32, 64]
    del model, layers
    assert ar.model.model.layers[1].mlp.up_proj.bits == 2, "read again"


def test_after_a_gguf_format_the_type_of_the_file_is_in_force(folder, tmp_path):
    ar = quantizer(folder, scheme="W4A16", group_size=None)
    ar.quantize_and_save(tmp_path / "file", format="gguf:q8_0")
    assert (ar.bits, ar.group_size) == (8, 32)
    assert ar.model is None


def test_quantize_needs_no_format_that_describes_activations(folder):
    ar = quantizer(folder, scheme="W4A16", act_bits=4, act_group_size=-1)
    model, schemes = ar.quantize()
    assert {(s["bits"], s["act_bits"]) for s in schemes.values()} == {(4, 4)}
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
