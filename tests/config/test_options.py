"""Options: one declaration gives argument, flag, check and documentation."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_round.config import (
    EVALUATION_GROUPS,
    GROUPS,
    RECIPES,
    Environment,
    OutputOptions,
    TuneOptions,
    all_settings,
    argument_names,
    build_options,
    options_markdown,
)
from auto_round.config.later import GRANTED, later_names
from auto_round.errors import ConfigError


def test_names_are_unique_across_groups_and_with_later_work():
    names = [n for s in all_settings() for n in (s.name, *s.spec.aliases, *s.spec.off)]
    assert len(names) == len(set(names))
    flags = [f for s in all_settings() if s.spec.cli for f in (*s.flags, *s.spec.off)]
    assert len(flags) == len(set(flags))
    assert not set(later_names()) & set(names)
    assert not set(later_names()) & set(flags)
    assert not set(GRANTED) & set(names)


def test_every_default_is_admitted_and_settling_is_stable():
    for group in (*GROUPS.values(), *EVALUATION_GROUPS.values()):
        first = group()
        again = group(**{f.name: getattr(first, f.name) for f in dataclasses.fields(group)})
        assert first == again


def test_every_option_is_documented():
    text = options_markdown()
    for setting in all_settings():
        assert f"| `{setting.name}` |" in text
        assert len(setting.spec.help) > 5


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_build(recipe):
    options = build_options({}, recipe)
    for name, value in RECIPES[recipe].items():
        assert getattr(options.tune, name, None) == value or getattr(options.calibration, name) == value


def test_what_the_user_says_beats_the_recipe():
    assert build_options({"iters": 3}, "best").tune.iters == 3
    assert build_options({}, "best").calibration.nsamples == 512
    assert build_options({"iters": None}, "best").tune.iters == 1000


@pytest.mark.parametrize(
    ("given", "group", "name", "value"),
    [
        ({"device": 0}, "model", "device_map", "0"),
        ({"device_map": {"q_proj": 1}}, "model", "device_map", {"q_proj": "1"}),
        ({"fp_layers": "a, b,"}, "scheme", "ignore_layers", ("a", "b")),
        ({"ignore_layers": ["a", "b"]}, "scheme", "ignore_layers", ("a", "b")),
        ({"to_quant_block_names": [["a"], ["b"]]}, "scheme", "to_quant_block_names", ("a", "b")),
        ({"enable_opt_rtn": True}, "tune", "disable_opt_rtn", False),
        ({"enable_opt_rtn": None}, "tune", "disable_opt_rtn", None),
        ({"disable_amp": True}, "tune", "amp", False),
        ({"asym": True}, "scheme", "sym", False),
        ({"bs": 4}, "tune", "batch_size", 4),
        ({"lr": 1}, "tune", "lr", 1.0),
        ({"max_shard_size": "2GiB"}, "output", "max_shard_size", 2 * 2**30),
        ({"max_shard_size": 10}, "output", "max_shard_size", 10),
        ({"scale_dtype": "BF16"}, "scheme", "scale_dtype", "bf16"),
        ({"device": None, "device_map": "cpu"}, "model", "device_map", "cpu"),
    ],
)
def test_spellings(given, group, name, value):
    assert getattr(getattr(build_options(given), group), name) == value


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"iter": 1}, '"iters"'),
        ({"nsample": 1}, '"nsamples"'),
        ({"iters": -1}, "at least 0"),
        ({"iters": True}, "whole number"),
        ({"iters": "5"}, "whole number"),
        ({"iters": 1.5}, "whole number"),
        ({"batch_size": 0}, "at least 1"),
        ({"group_size": -2}, "at least -1"),
        ({"lr": float("nan")}, "a number"),
        ({"momentum": 2}, "from 0 to 1"),
        ({"amp": "yes"}, "True or False"),
        ({"platform": "huf"}, "model_scope"),
        ({"scale_dtype": "f16"}, '"fp16"'),
        ({"max_shard_size": "5 XB"}, "5GB"),
        ({"max_shard_size": 0}, "above zero"),
        ({"ignore_layers": 5}, "list of names"),
        ({"layer_config": "{a:{bits:4}"}, "at the end"),
        ({"layer_config": "{a:"}, "too early"),
        ({"layer_config": "{a:b} c"}, "character 7"),
        ({"layer_config": '{a:"b}'}, "unclosed quote"),
        ({"layer_config": "no-such.json"}, "no such file"),
        ({"layer_config": "[1]"}, "layer name"),
        ({"format": " , "}, "auto_round"),
        ({"device": 0, "device_map": 1}, "same option"),
        ({"amp": True, "disable_amp": True}, "same option"),
    ],
)
def test_errors_name_the_option_and_the_remedy(given, text):
    with pytest.raises(ConfigError) as caught:
        build_options(given)
    assert text in str(caught.value)
    assert any(name in str(caught.value) for name in given)


def test_the_environment_chooses_the_hub_unless_told_otherwise():
    there = Environment(use_modelscope=True)
    assert build_options({}, environment=there).model.platform == "model_scope"
    assert build_options({"platform": "hf"}, environment=there).model.platform == "hf"
    assert build_options({}, environment=Environment()).model.platform == "hf"


def test_unknown_recipe():
    with pytest.raises(ConfigError, match='"best"'):
        build_options({}, "bests")
    with pytest.raises(ConfigError, match='unknown recipe "None"'):
        build_options({}, None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{k_proj:{bits:8}}", {"k_proj": {"bits": 8}}),
        ('{"k_proj": {"bits": 8, "sym": false}}', {"k_proj": {"bits": 8, "sym": False}}),
        ("{layers.*q_proj: W8A16, lm_head:GGUF:Q6_K}", {"layers.*q_proj": "W8A16", "lm_head": "GGUF:Q6_K"}),
        ("{a:{bits:2,sym:false,group_size:-1,scale_dtype:none},}", None),
        ("{}", {}),
    ],
)
def test_layer_rules(text, wanted):
    if wanted is None:
        wanted = {"a": {"bits": 2, "sym": False, "group_size": -1, "scale_dtype": None}}
    assert build_options({"layer_config": text}).scheme.layer_config == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("W2A16, w4a16", ("W2A16", "w4a16")),
        ("GGUF:Q4_K_S,GGUF:Q6_K", ("GGUF:Q4_K_S", "GGUF:Q6_K")),
        ("W2A16,{bits:3,group_size:64},W4A16", ("W2A16", {"bits": 3, "group_size": 64}, "W4A16")),
        ('["W2A16", {"bits": 3, "sym": false}]', ("W2A16", {"bits": 3, "sym": False})),
    ],
)
def test_schemes_to_choose_from_as_typed(text, wanted):
    assert build_options({"scheme_options": text, "avg_bits": 3}).auto.scheme_options == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("W2A16 {bits:3}", "unexpected '{' at character 7"),
        ("W2A16,{bits:3", "at the end"),
        ("W2A16,{bits}", "name: value"),
    ],
)
def test_schemes_to_choose_from_that_cannot_be_read(text, words):
    with pytest.raises(ConfigError, match=words):
        build_options({"scheme_options": text, "avg_bits": 3})


@pytest.mark.parametrize("name", ["lr", "minmax_lr"])
@pytest.mark.parametrize("value", [-1.0, 0.0, 10.0, float("inf")])
def test_step_sizes_have_the_same_limits_however_they_are_missed(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be above 0 and below 10, got "):
        build_options({name: value})


def test_rows_have_a_token_to_predict():
    with pytest.raises(ConfigError, match='"seqlen" cannot be 1: expected a whole number, at least 2'):
        build_options({"seqlen": 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{k_proj:{bits:8},k_proj:{bits:2}}", '"k_proj" is given twice'),
        ('{"k_proj": {"bits": 8}, "k_proj": {"bits": 2}}', '"k_proj" is given twice'),
        ("{k_proj:{bits:8,bits:2}}", '"bits" is given twice'),
        ('{"k_proj": {"bits": 8, "bits": 2}}', '"bits" is given twice'),
        ("", "expected a mapping of layer name to scheme, JSON or a .json file"),
        (" ", "expected a mapping of layer name to scheme, JSON or a .json file"),
    ],
)
def test_layer_rules_that_would_be_lost(text, said):
    with pytest.raises(ConfigError, match=said):
        build_options({"layer_config": text})


def test_layer_rules_from_a_file(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text('{"k_proj": "W8A16"}')
    for place in (str(path), path):
        assert build_options({"layer_config": place}).scheme.layer_config == {"k_proj": "W8A16"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file; relative paths begin at"),
        ("folder", "it is a folder; expected a .json file"),
        (b"\xff\xfe\x00", "it holds no text; expected JSON in UTF-8"),
        (b'{"made_by": "auto-round", "layer_config": [1]}', "expected a plan of AutoScheme"),
        (b"[1]", "layer name"),
    ],
)
def test_files_that_hold_no_layer_rules(tmp_path, content, said):
    path = tmp_path / "plan.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        build_options({"layer_config": str(path)})


@given(st.text(alphabet="{}:,\"'ab1. -", max_size=30))
def test_any_layer_rule_text_is_read_or_refused(text):
    try:
        rules = build_options({"layer_config": text}).scheme.layer_config
    except ConfigError:
        return
    assert isinstance(rules, dict)


_NAMES = sorted(argument_names())
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**6),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@given(st.dictionaries(st.sampled_from(_NAMES) | st.text(max_size=6), _VALUES, max_size=4))
def test_any_arguments_are_read_or_refused(given):
    with contextlib.suppress(ConfigError):
        build_options(given)


@pytest.mark.parametrize(
    ("iters", "bits", "lr", "wanted"),
    [
        (200, 4, None, 1 / 200),
        (1000, 4, None, 1 / 1000),
        (1000, 3, None, 2 / 1000),
        (999, 2, None, 1 / 999),
        (50, 2, None, 1 / 50),
        (133, 4, None, 0.05 * math.sqrt(3 / 133)),
        (134, 8, None, 1 / 134),
        (20, 4, None, 0.05 * math.sqrt(3 / 20)),
        (20, 3, None, 1 / 20),
        (50, 4, 5e-3, 5e-3),
        (0, 4, None, 0.0),
    ],
)
def test_learning_rate_rule(iters, bits, lr, wanted):
    tune = TuneOptions(iters=iters, lr=lr)
    assert tune.learning_rate(bits) == wanted


def test_formats():
    assert OutputOptions(format="Auto-Round").formats == ("auto_round",)
    assert OutputOptions(format="auto_round:auto_gptq, fake,fake").formats == ("auto_round:auto_gptq", "fake")


def test_overrides_hold_only_what_was_said():
    scheme = build_options({"bits": 3, "sym": False, "scale_dtype": "bf16"}).scheme
    assert scheme.overrides() == {"bits": 3, "sym": False, "scale_dtype": "bfloat16"}
