"""`AutoRound(...)`: every known argument is read, or answered plainly."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import nn

import auto_round
from auto_round import AutoRound, AutoScheme, QuantizationScheme
from auto_round.calibration.grammar import parse_dataset
from auto_round.config import all_settings
from auto_round.errors import ConfigError, UnsupportedError

GUIDE = {
    "platform": "hf",
    "scheme": "w4a16",
    "layer_config": {"k_proj": {"bits": 8}, "lm_head": "W8A16"},
    "dataset": "NeelNanda/pile-10k",
    "iters": 10,
    "seqlen": 64,
    "nsamples": 4,
    "batch_size": 2,
    "gradient_accumulate_steps": 2,
    "low_gpu_mem_usage": True,
    "device_map": {"q_proj": "cuda:1"},
    "enable_torch_compile": False,
    "seed": 1,
    "enable_adam": True,
    "extra_config": None,
    "enable_alg_ext": False,
    "disable_opt_rtn": None,
    "low_cpu_mem_usage": True,
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "data_type": "int",
    "act_bits": 16,
    "act_group_size": None,
    "act_sym": None,
    "act_data_type": None,
    "act_dynamic": None,
    "super_bits": None,
    "super_group_size": None,
    "model_dtype": "bf16",
    "trust_remote_code": True,
    "amp": True,
    "lr": None,
    "minmax_lr": 0.1,
    "lr_scheduler": None,
    "enable_minmax_tuning": True,
    "enable_norm_bias_tuning": False,
    "enable_quanted_input": True,
    "not_use_best_mse": False,
    "dynamic_max_gap": -1,
    "nblocks": 1,
    "to_quant_block_names": None,
    "momentum": 0.0,
    "enable_deterministic_algorithms": False,
    "static_kv_dtype": None,
    "static_attention_dtype": None,
    "enable_opt_rtn": None,
    "ignore_layers": "",
    "quant_lm_head": False,
    "scale_dtype": "fp16",
    "device": None,
}


@pytest.mark.parametrize("name", GUIDE)
def test_each_argument_alone(name):
    AutoRound("m", **{name: GUIDE[name]})


def test_all_arguments_together():
    options = AutoRound("m", "t", **GUIDE).options
    assert options.model.tokenizer == "t"
    assert options.scheme.overrides()["sym"] is False
    assert options.tune.minmax_lr == 0.1


def test_older_forms():
    named = AutoRound("m", "t", bits=3, group_size=64, sym=False).options
    assert named == AutoRound("m", "t", 3, 64, False).options
    assert named.scheme.overrides() == {"bits": 3, "group_size": 64, "sym": False}
    assert AutoRound("m", fp_layers="a").options == AutoRound("m", ignore_layers=["a"]).options
    assert AutoRound("m", device="cpu").options == AutoRound("m", device_map="cpu").options
    assert AutoRound("m", enable_opt_rtn=True).options.tune.disable_opt_rtn is False


def test_by_position():
    assert AutoRound("m", None, "hf", "W8A16", None, "python-docs", 7).options == (
        AutoRound("m", scheme="W8A16", dataset="python-docs", iters=7).options
    )
    scheme = QuantizationScheme(bits=3)
    assert AutoRound("m", scheme=scheme).options.scheme.scheme == scheme


def test_extra_config_overrules():
    assert AutoRound("m", iters=3, extra_config={"iters": 5}).options.tune.iters == 5
    with pytest.raises(ConfigError, match="mapping"):
        AutoRound("m", extra_config=[1])


def test_a_flat_list_of_shared_layers_is_one_set():
    """It was read letter by letter, and letters match everything."""
    for shared in (["q_proj", "k_proj"], [["q_proj", "k_proj"]], (("q_proj", "k_proj"),)):
        scheme = AutoScheme(avg_bits=3, options="W2A16,W4A16", shared_layers=shared)
        assert AutoRound("m", scheme=scheme).options.auto.shared_layers == (("q_proj", "k_proj"),)


@pytest.mark.parametrize("named", [{"avg_bits": 4}, {"target_size": "1GB"}, {"shared_layers": [["q", "k"]]}])
def test_what_a_choice_goes_by_is_said_once(named):
    """`AutoScheme` won silently."""
    scheme = AutoScheme(avg_bits=3, options="W2A16,W4A16")
    with pytest.raises(ConfigError, match=f"{next(iter(named))} beside an AutoScheme"):
        AutoRound("m", scheme=scheme, **named)


@pytest.mark.parametrize("named", [{"output_dir": "a\0b"}, {"dataset": "a\0b"}])
def test_text_without_nul(named, tmp_path):
    with pytest.raises(ConfigError, match="NUL"):
        AutoRound("m", **named)
    with pytest.raises(ConfigError, match="NUL"):
        AutoRound("m\0")
    with pytest.raises(ConfigError, match="NUL"):
        AutoRound(str(tmp_path)).quantize_and_save("out\0")


@pytest.mark.parametrize("name", ["scale_dtype", "model_dtype"])
def test_dtypes_of_pytorch_are_words(name):
    options = AutoRound("m", **{name: torch.bfloat16}).options
    assert getattr(options.scheme if name == "scale_dtype" else options.model, name) == "bfloat16"
    with pytest.raises(ConfigError, match=r"cannot be .*int8.*bf16"):
        AutoRound("m", **{name: torch.int8})


@pytest.mark.parametrize("inside", ["", "/deeper"])
def test_a_work_space_that_cannot_be_made(inside, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AR_WORK_SPACE", f"{tmp_path}/file{inside}")
    with pytest.raises(ConfigError, match=r"AR_WORK_SPACE is .*file.*name another one"):
        AutoRound(str(tmp_path)).quantize()


def test_recipe():
    assert AutoRound("m", recipe="light").options.tune.iters == 50
    assert AutoRound("m", recipe="light", iters=9).options.tune.iters == 9


@pytest.mark.parametrize(
    ("positional", "named", "text"),
    [
        ((), {"iter": 5}, '"iters"'),
        ((), {"groupsize": 5}, '"group_size"'),
        ((), {"dry_run": True}, "unexpected keyword"),
        (("t", "hf"), {"platform": "hf"}, "both by position"),
        (("t", 4, 128, True, None, 8, 1), {}, "at most 5"),
        ((), {"scheme": "W4A16", "batch_size": "8"}, "whole number"),
    ],
)
def test_errors(positional, named, text):
    with pytest.raises(ConfigError) as caught:
        AutoRound("m", *positional, **named)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["tasks", "task", "eval_bs", "limit"])
def test_evaluation_says_where_it_is(name):
    with pytest.raises(TypeError, match="EvaluationOptions"):
        AutoRound("m", **{name: 1})


@pytest.mark.parametrize(
    "named",
    [
        {"algorithm": "awq"},
        {"svdquant_rank": 16},
    ],
)
def test_later_work_says_so(named):
    with pytest.raises(UnsupportedError, match="not there yet") as caught:
        AutoRound("m", **named)
    assert next(iter(named)) in str(caught.value)


def test_a_model_in_memory_needs_a_tokenizer_unless_the_data_are_tokens():
    with pytest.raises(ConfigError, match="tokenizer"):
        AutoRound(nn.Linear(2, 2))
    options = AutoRound(nn.Linear(2, 2), dataset=[[1, 2, 3]]).options
    assert options.model.model == "Linear"
    assert options.calibration.dataset == "list given from Python"


def test_signature_and_documentation_name_every_option():
    parameters = inspect.signature(AutoRound).parameters
    for setting in all_settings():
        if setting.name != "dry_run":
            assert parameters[setting.name].default in (setting.default, inspect.Parameter.empty, None)
            assert setting.name in AutoRound.__doc__


def test_public_names():
    for name in auto_round.__all__:
        assert getattr(auto_round, name) is not None
        assert name in dir(auto_round)
    with pytest.raises(AttributeError, match="nothing"):
        _ = auto_round.nothing


def test_saving_before_quantizing_is_an_error():
    with pytest.raises(ConfigError, match="call quantize"):
        AutoRound("m").save_quantized("out")


def test_arguments_that_change_nothing_say_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("auto_round"), "propagate", True)
    AutoRound("some/model", model_free=True)
    assert "model_free has no effect" in caplog.text
    caplog.clear()
    AutoRound("some/model", model_free=False)
    assert "no effect" not in caplog.text


class Words:
    """Stands for a tokenizer."""

    def __call__(self, text):
        return {"input_ids": []}


@pytest.mark.parametrize(
    ("model", "tokenizer", "said"),
    [
        (None, None, "model is of type NoneType: expected a folder"),
        (5, None, "model is of type int"),
        (nn.Linear, Words(), "model is the class Linear"),
        (Words(), nn.Linear(2, 2), "changed places"),
        ("m", 5, "tokenizer is of type int: expected a folder"),
        ("m", Words, "tokenizer is the class Words"),
        ("m", nn.Linear(2, 2), "tokenizer is of type Linear"),
    ],
    ids=[
        "nothing",
        "number",
        "class",
        "swapped",
        "number as tokenizer",
        "class as tokenizer",
        "layer as tokenizer",
    ],
)
def test_a_model_and_a_tokenizer_that_are_something_else(model, tokenizer, said):
    with pytest.raises(ConfigError, match=said):
        AutoRound(model, tokenizer)


@pytest.mark.parametrize(
    ("where", "said"), [("", "\"output_dir\" cannot be ''"), (" ", "not empty"), (5, "output_dir.*text")]
)
def test_an_output_without_a_name(where, said, tmp_path, monkeypatch):
    """An empty name was the working directory, which the output took the place of."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        AutoRound("m").quantize_and_save(where)
    assert not list(tmp_path.iterdir())


def test_formats_may_be_a_list():
    assert AutoRound("m", format=["auto_round", "auto_gptq"]).options.output.formats == (
        "auto_round",
        "auto_gptq",
    )
    with pytest.raises(ConfigError, match='"format" cannot be 5'):
        AutoRound("m", format=5)


@pytest.mark.parametrize("name", ["plain.txt", "a, b.txt", "c:d.txt", "it's.txt"])
def test_a_path_is_one_data_set_whatever_is_in_its_name(name, tmp_path):
    path = tmp_path / name
    path.write_text("text")
    scheme = AutoScheme(avg_bits=4, options=("W4A16", "W8A16"), dataset=path)
    options = AutoRound("model", dataset=path, scheme=scheme).options
    for text in (options.calibration.dataset, options.auto.score_dataset):
        assert [item.name for item in parse_dataset(text)] == [str(path)]
