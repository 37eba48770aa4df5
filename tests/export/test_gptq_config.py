"""The config of GPTQ folders: its exact content, what readers find in it, and that Transformers takes it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.export.gptq_config import gptq_config
from auto_round.export.table import EXPORTERS
from auto_round.facts.layer import Block
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.testing.config_reader import gptq_in_optimum
from auto_round.testing.exporter_kit import check_exporter, expert_case, small_case
from auto_round.version import __version__
from export.untorn import untorn

S = QuantizationScheme
NAMES = [layer.name for layer in expert_case(S(4, 32), experts=None).layers if layer.name != "lm_head"]


def config_of(case, checkpoint_format="gptq"):
    return gptq_config(checkpoint_format, case.plan, case.layers, case.blocks)


def names_of(case, *, kept):
    return [name for name, entry in case.plan.entries.items() if (entry.scheme is None) == kept]


def test_the_whole_config_of_a_plain_run():
    assert config_of(small_case(S(4, 32), router="router"), "gptq_v2") == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": False,
        "block_name_to_quantize": "model.layers",
        "modules_in_block_to_quantize": [
            [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")]
        ],
        "dynamic": {r"-:^model\.layers\.1\.mlp\.router$": {}},
        "provider": "auto-round",
        "autoround_version": __version__,
    }


def test_experts_are_not_listed_one_by_one():
    case = expert_case(S(4, 32), experts=S(4, 32), changes={"model.layers.0.self_attn.o_proj": None})
    assert "modules_in_block_to_quantize" not in config_of(case)
    case = expert_case(S(4, 32), experts=None)
    (listed,) = config_of(case)["modules_in_block_to_quantize"]
    assert listed == names_of(case, kept=False)


def test_rules_say_what_differs_under_every_name_that_readers_use():
    attention = {f"model.layers.{i}.self_attn.{p}_proj": S(8, 32) for i in range(2) for p in "qkv"}
    config = config_of(expert_case(S(4, 32, sym=False), experts=S(2, 16, sym=False), changes=attention))
    eight, two = {"bits": 8, "sym": True}, {"bits": 2, "group_size": 16}
    assert config["dynamic"] == {
        r"-:^model\.layers\.1\.mlp\.gate$": {},
        r"+:^model\.layers\.(?:0|1)\.self_attn\.q_proj$": eight,
        r"+:^model\.layers\.(?:0|1)\.self_attn\.k_proj$": eight,
        r"+:^model\.layers\.(?:0|1)\.self_attn\.v_proj$": eight,
        r"+:^model\.layers\.(?:0|1)\.self_attn\.qkv_proj$": eight,
        r"+:^model\.layers\.1\.mlp\.experts\.(?:0|1)\.gate_proj$": two,
        r"+:^model\.layers\.1\.mlp\.experts\.(?:0|1)\.up_proj$": two,
        r"+:^model\.layers\.1\.mlp\.experts\.(?:0|1)\.down_proj$": two,
        r"+:^model\.layers\.1\.mlp\.experts$": two,
        r"+:^model\.layers\.1\.mlp\.experts\.routed_experts$": two,
    }


def test_a_quantized_head_with_a_scheme_of_its_own():
    config = config_of(small_case(S(4, 32), head=S(8, 16), router="router"))
    assert config["lm_head"] is True
    assert config["dynamic"]["+:^lm_head$"] == {"bits": 8, "group_size": 16}
    assert config["modules_in_block_to_quantize"][0][-1] == "lm_head"


def test_a_model_without_kept_layers_needs_no_lists():
    case = small_case(S(4, 32))
    case = dataclasses.replace(case, layers=tuple(x for x in case.layers if not x.name.endswith("gate")))
    config = config_of(case)
    assert not {"dynamic", "modules_in_block_to_quantize"} & set(config)


def test_modules_under_another_path_than_on_disk_are_named_too():
    case = small_case(S(4, 32))
    first = dataclasses.replace(case.layers[0], parameter="model.text.layers.0.mlp.gate_proj.weight")
    case = small_case(S(4, 32), changes={first.name: None})
    rules = config_of(dataclasses.replace(case, layers=(first, *case.layers[1:])))["dynamic"]
    assert {r"-:^model\.layers\.0\.mlp\.gate_proj$", r"-:^model\.text\.layers\.0\.mlp\.gate_proj$"} <= set(
        rules
    )


def test_blocks_under_two_names_are_left_to_the_readers():
    case = small_case(S(4, 32))
    blocks = (case.blocks[0], Block(1, "model.tower.blocks.1", "model.tower.blocks.1"))
    assert "block_name_to_quantize" not in gptq_config("gptq", case.plan, case.layers, blocks)


def test_nothing_quantized_has_no_config():
    case = small_case(S(16, 128, data_type="fp"), changes=dict.fromkeys(small_case(S(4, 32)).plan.entries))
    assert config_of(case) is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.layers.0.mlp.up_proj": None},
        {"model.layers.0.mlp.up_proj": None, "model.layers.1.mlp.up_proj": None},
        {f"model.layers.0.mlp.{p}_proj": None for p in ("gate", "up", "down")},
    ],
)
def test_optimum_finds_every_plan_of_one_scheme(changes):
    for router in ("gate", "router"):
        case = small_case(S(4, 32), changes=changes, router=router)
        config = config_of(case)
        found = {name for name in case.plan.entries if gptq_in_optimum(config, name, ())}
        assert found == set(names_of(case, kept=False))


schemes = st.one_of(
    st.none(),
    st.builds(
        S, bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([-1, 16, 32]), sym=st.booleans()
    ),
)


@given(
    base=schemes.filter(bool),
    experts=schemes,
    changes=st.dictionaries(st.sampled_from(NAMES), schemes, max_size=5),
    name=st.sampled_from(["auto_gptq", "gptqmodel"]),
)
@settings(max_examples=15, deadline=None)
def test_readers_find_every_plan(base, experts, changes, name):
    case = expert_case(base, experts=experts, changes=untorn(changes))
    if case.plan.quantized:
        check_exporter(EXPORTERS[name], case)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_transformers_takes_the_config(checkpoint_format):
    from transformers import AutoRoundConfig, GPTQConfig

    case = expert_case(S(4, 32), experts=S(8, 32))
    case = dataclasses.replace(case, layers=tuple(x for x in case.layers if not x.name.endswith("gate")))
    config = json.loads(json.dumps(config_of(case, checkpoint_format)))
    own = GPTQConfig.from_dict(dict(config))
    assert (own.bits, own.group_size, own.sym, own.desc_act) == (4, 32, True, False)
    assert own.format == checkpoint_format
    ours = AutoRoundConfig.from_dict(dict(config))
    assert ours.dynamic == config["dynamic"]
    assert ours.checkpoint_format == checkpoint_format
