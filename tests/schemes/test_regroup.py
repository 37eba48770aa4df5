"""Groups that do not divide a row: smaller ones where the user named no size, a refusal where he did."""

from __future__ import annotations

from dataclasses import replace

import pytest

from auto_round.errors import ConfigError
from auto_round.export.table import all_refusals, parse_formats
from auto_round.schemes.make import make_plan
from auto_round.schemes.plan import PlanRequest
from auto_round.schemes.scheme import PRESET_SCHEMES, QuantizationScheme, names_group_size

ROWS = {"q_proj": 576, "o_proj": 192, "up_proj": 576, "down_proj": 1536, "odd_proj": 96, "bad_proj": 100}


@pytest.fixture
def plan(layers):
    """A plan of six layers with rows of those lengths."""
    like = next(layer for layer in layers if layer.role.value == "linear")
    few = [replace(like, name=f"layers.0.{name}", shape=(64, n_in)) for name, n_in in ROWS.items()]

    def make(**request):
        return make_plan(few, PlanRequest(**request)), few

    return make


def groups(plan):
    return {n.rpartition(".")[2]: e.scheme and e.scheme.group_size for n, e in plan.entries.items()}


FITTED = {"q_proj": 64, "o_proj": 64, "up_proj": 64, "down_proj": 128, "odd_proj": 32, "bad_proj": None}


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"scheme": "w4a16"},
        {"scheme": "W8A16"},
        {"scheme": "W4A16", "overrides": {"bits": 3, "group_size": None}},
        {"scheme": {"bits": 4}},
        {"scheme": {"bits": 4, "group_size": None}},
        {"scheme": "W4A16_MIXED"},
    ],
)
def test_the_largest_that_divides_and_is_read_everywhere(plan, request_):
    made, _ = plan(**request_)
    assert groups(made) == FITTED
    (note,) = [w for w in made.warnings if "groups of 128 do not divide" in w]
    assert "groups of 64: layers.0.q_proj" in note
    assert "groups of 32: layers.0.odd_proj" in note
    assert "--group_size" in note


@pytest.mark.parametrize(
    "request_",
    [
        {"overrides": {"group_size": 128}},
        {"scheme": {"bits": 4, "group_size": 128}},
        {"scheme": QuantizationScheme(bits=4)},
        {"scheme": "W2A16G64"},
        {"layer_config": {"odd_proj": {"bits": 8, "group_size": 64}}},
        {"layer_config": {"odd_proj": QuantizationScheme(bits=8)}},
        {"overrides": {"group_size": 128}, "layer_config": {"q_proj|o_proj|up_proj|odd_proj": {"bits": 8}}},
    ],
)
def test_sizes_that_the_user_named_are_refused_where_they_do_not_divide(plan, request_):
    with pytest.raises(ConfigError, match="does not divide the rows"):
        plan(**request_)


def test_rules_that_name_no_size(plan):
    made, _ = plan(layer_config={"q_proj": {"bits": 8}, "odd_proj": "W8A16", "o_proj": {"group_size": 96}})
    assert groups(made) == {**FITTED, "o_proj": 96}
    assert made.entries["layers.0.q_proj"].scheme.bits == 8
    made, _ = plan(overrides={"group_size": 32}, layer_config={"odd_proj": "W8A16"})
    assert groups(made)["odd_proj"] == 32


def test_one_size_for_all(plan):
    made, _ = plan(one_group_size=True, layer_config={"o_proj": {"group_size": 96}})
    assert groups(made) == {**dict.fromkeys(FITTED, 32), "o_proj": 96, "bad_proj": None}
    assert made.scheme.group_size == 32


def test_the_scheme_of_the_whole_follows_when_all_layers_do(layers):
    like = next(layer for layer in layers if layer.role.value == "linear")
    few = [replace(like, name=f"layers.{i}.q_proj", shape=(64, 64)) for i in range(3)]
    made = make_plan(few, PlanRequest())
    assert made.scheme == QuantizationScheme(bits=4, group_size=64)
    assert groups(made) == {"q_proj": 64}


@pytest.mark.parametrize("name", ["auto_round", "auto_gptq", "gptqmodel", "fake"])
def test_formats_that_hold_several_sizes(plan, name):
    made, few = plan(layer_config={"bad_proj": "BF16"})
    assert not [r for e in parse_formats(name) for r in all_refusals(e, made, few)]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("W4A16", False),
        ("w3a16", False),
        ("W2A16G32", True),
        ("GGUF:Q4_K_M", True),
        ("MXFP4", True),
        ({"bits": 2}, False),
        ({"group_size": -1}, True),
        (PRESET_SCHEMES["W4A16"], True),
    ],
)
def test_who_names_a_size(value, named):
    assert names_group_size(value) is named
