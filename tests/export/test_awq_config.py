"""The config of AWQ folders: its exact content, what readers find in it, and that Transformers takes it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.export.awq_config import awq_config, clashes, not_converted
from auto_round.export.table import EXPORTERS
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.testing.exporter_kit import check_exporter, expert_case, small_case
from auto_round.version import __version__
from export.untorn import untorn

S = QuantizationScheme
NAMES = [layer.name for layer in expert_case(S(4, 32), experts=None).layers if layer.name != "lm_head"]


def config_of(case):
    return awq_config(case.plan, case.layers, case.blocks)


@pytest.mark.parametrize("sym", [True, False])
def test_the_whole_config_of_a_plain_run(sym):
    assert config_of(small_case(S(4, 32, sym=sym), router="router")) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["mlp.router", "lm_head"],
        "dynamic": {r"-:^model\.layers\.1\.mlp\.router$": {}},
        "provider": "auto-round",
        "autoround_version": __version__,
    }


def test_short_entries_only_where_they_are_no_part_of_a_written_name():
    case = expert_case(S(4, 32), experts=S(4, 32), changes={"model.layers.0.self_attn.o_proj": None})
    # layer 0 has mlp.gate_proj, layer 1 a written o_proj
    assert config_of(case)["modules_to_not_convert"] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.gate",
        "lm_head",
    ]
    both = {f"model.layers.{i}.self_attn.o_proj": None for i in range(2)}
    short = config_of(expert_case(S(4, 32), experts=S(4, 32), changes=both))
    assert short["modules_to_not_convert"] == ["self_attn.o_proj", "model.layers.1.mlp.gate", "lm_head"]


def test_kept_experts_are_named_as_one_module_too():
    entries = config_of(expert_case(S(4, 32), experts=None))["modules_to_not_convert"]
    assert {"mlp.experts", "mlp.experts.routed_experts", "mlp.experts.0.gate_proj"} <= set(entries)


def test_kept_parts_are_named_as_the_merged_matrix_too():
    kept = {f"model.layers.0.self_attn.{p}_proj": None for p in "qkv"}
    entries = config_of(expert_case(S(4, 32), experts=S(4, 32), changes=kept))["modules_to_not_convert"]
    assert "model.layers.0.self_attn.qkv_proj" in entries


def test_clashes_are_found():
    case = small_case(S(4, 32))
    assert clashes(case.plan, case.layers) == [("model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj")]
    case = small_case(S(4, 32), router="router")
    assert clashes(case.plan, case.layers) == []


def test_modules_under_another_path_than_on_disk_are_named_too():
    case = small_case(S(4, 32), router="router", changes={"model.layers.0.mlp.gate_proj": None})
    first = dataclasses.replace(case.layers[0], parameter="model.text.layers.0.mlp.gate_proj.weight")
    entries = not_converted(case.plan, (first, *case.layers[1:]), case.blocks)
    assert {"model.layers.0.mlp.gate_proj", "model.text.layers.0.mlp.gate_proj"} <= set(entries)


def test_nothing_quantized_has_no_config():
    case = small_case(S(16, 128, data_type="fp"), changes=dict.fromkeys(small_case(S(4, 32)).plan.entries))
    assert config_of(case) is None


@given(
    group=st.sampled_from([-1, 16, 32]),
    sym=st.booleans(),
    kept=st.sets(st.sampled_from(NAMES), max_size=6),
    experts=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_readers_find_every_plan(group, sym, kept, experts):
    scheme = S(4, group, sym=sym)
    case = expert_case(scheme, experts=scheme if experts else None, changes=untorn(dict.fromkeys(kept)))
    if case.plan.quantized and not EXPORTERS["auto_awq"].refusals(case.plan, case.layers):
        check_exporter(EXPORTERS["auto_awq"], case)


def test_transformers_takes_the_config():
    from transformers import AutoRoundConfig, AwqConfig

    config = json.loads(json.dumps(config_of(expert_case(S(4, 32), experts=S(4, 32)))))
    own = AwqConfig.from_dict(dict(config))
    assert (own.bits, own.group_size, own.zero_point, own.format) == (4, 32, True, "gemm")
    assert own.modules_to_not_convert == config["modules_to_not_convert"]
    ours = AutoRoundConfig.from_dict(dict(config))
    assert ours.modules_to_not_convert == config["modules_to_not_convert"]
