"""The quantization_config: its exact content, what readers find in it, and that Transformers takes it."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.errors import InternalError
from auto_round.export.auto_round_config import auto_round_config
from auto_round.export.table import EXPORTERS
from auto_round.facts.layer import Block
from auto_round.schemes.make import make_plan
from auto_round.schemes.plan import PlanRequest
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.testing.config_reader import fields_of
from auto_round.testing.exporter_kit import check_exporter, expert_case, small_case
from auto_round.version import __version__

S = QuantizationScheme
KEPT = {"bits": 16, "data_type": "float"}
NAMES = [layer.name for layer in small_case(S(4, 32)).layers]


def config_of(case, facts=None):
    return (
        EXPORTERS["auto_round"]
        .for_plan(case.plan, case.layers)
        .config(case.plan, case.layers, case.blocks, facts)
    )


def planned(request):
    """A case whose plan is made as in a real run."""
    case = small_case(S(4, 32))
    plan = make_plan(case.layers, request, blocks=case.blocks)
    return type(case)(case.layers, case.blocks, plan, case.tensors)


def test_the_whole_config_of_a_plain_run():
    assert config_of(small_case(S(4, 32))) == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "autoround_version": __version__,
        "block_name_to_quantize": "model.layers",
        "extra_config": {"model.layers.1.mlp.gate": KEPT},
    }


def test_layers_list_only_what_differs_and_the_head_everything():
    changes = {"model.layers.0.mlp.up_proj": S(8, 32), "model.layers.1.mlp.up_proj": S(2, 16)}
    extra = config_of(small_case(S(4, 32), head=S(4, 32), changes=changes))["extra_config"]
    assert extra["model.layers.0.mlp.up_proj"] == {"bits": 8}
    assert extra["model.layers.1.mlp.up_proj"] == {"bits": 2, "group_size": 16}
    assert extra["lm_head"] == {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}


def test_every_entry_names_its_bits():
    """vLLM takes an exact entry without them for 16 bits."""
    changes = {"model.layers.0.mlp.down_proj": S(4, 16), "model.layers.1.mlp.down_proj": S(4, 32, sym=False)}
    extra = config_of(small_case(S(4, 32), changes=changes))["extra_config"]
    assert extra["model.layers.0.mlp.down_proj"] == {"bits": 4, "group_size": 16}
    assert extra["model.layers.1.mlp.down_proj"] == {"bits": 4, "sym": False}


def test_the_module_of_all_experts_gets_an_entry():
    """vLLM asks for it and not for single experts."""
    for experts, entry in ((S(8, 32), {"bits": 8}), (None, KEPT), (S(4, 32), None)):
        case = expert_case(S(4, 32), experts=experts)
        extra = config_of(case).get("extra_config", {})
        for name in ("model.layers.1.mlp.experts", "model.layers.1.mlp.experts.routed_experts"):
            assert extra.get(name) == entry
        check_exporter(EXPORTERS["auto_round"], case)


@pytest.mark.parametrize("form", ["auto_round:auto_awq", "auto_round"])
def test_zero_points_of_the_awq_order_are_announced(form):
    """They are always stored; told otherwise, vLLM and SGLang leave Marlin for kernels in float16."""
    case = small_case(
        S(4, 32, sym=form == "auto_round:auto_awq"),
        changes={"model.layers.0.mlp.up_proj": S(4, 16, sym=form == "auto_round:auto_awq")},
    )
    exact = EXPORTERS[form].for_plan(case.plan, case.layers)
    config = exact.config(case.plan, case.layers, case.blocks)
    assert (config["packing_format"], config["sym"]) == ("auto_round:auto_awq", False)
    assert config["extra_config"]["model.layers.0.mlp.up_proj"] == {"bits": 4, "group_size": 16}
    check_exporter(EXPORTERS[form], case)


def test_scale_dtypes_are_named_where_they_are_not_float16():
    config = config_of(
        small_case(S(4, 32, scale_dtype="bfloat16"), changes={"model.layers.0.mlp.up_proj": S(8, 32)})
    )
    assert config["scale_dtype"] == "torch.bfloat16"
    assert config["extra_config"]["model.layers.0.mlp.up_proj"] == {"bits": 8, "scale_dtype": "torch.float16"}


def test_a_sixteen_bit_scheme_with_a_few_quantized_layers():
    names = [n for n in NAMES if n.endswith("up_proj")]
    case = small_case(
        S(16, 128, data_type="fp"), changes={n: S(4, 32) if n in names else None for n in NAMES}
    )
    config = config_of(case)
    assert config["bits"] == 4
    assert {n for n in NAMES if fields_of(config, n, full_match=False)} == set(names)


def test_a_head_alone_is_quantized():
    """Readers that are told no blocks take every layer for a quantized one."""
    in_blocks = [name for name in NAMES if name != "lm_head"]
    case = small_case(S(4, 32), head=S(4, 32), changes=dict.fromkeys(in_blocks))
    config = config_of(case)
    assert "block_name_to_quantize" not in config
    assert all(config["extra_config"][name]["bits"] == 16 for name in in_blocks)
    check_exporter(EXPORTERS["auto_round"], case)


def test_blocks_under_two_names():
    case = small_case(S(4, 32))
    blocks = (case.blocks[0], Block(1, "model.tower.blocks.1", "model.tower.blocks.1"))
    config = auto_round_config("auto_round", case.plan, case.layers, blocks)
    assert config["block_name_to_quantize"] == ["model.layers", "model.tower.blocks"]


@pytest.mark.parametrize(
    ("key", "pattern"),
    [("up_proj", r".*up_proj.*"), (r"0\.mlp\.(gate|up)_proj", r".*(?:0\.mlp\.(gate|up)_proj).*")],
)
def test_patterns_of_the_user_are_kept_in_a_form_that_all_readers_understand(key, pattern):
    case = planned(PlanRequest("W4A16", {"group_size": 32}, {key: {"bits": 8}}))
    extra = config_of(case)["extra_config"]
    assert extra[pattern] == {"bits": 8}
    found = {name for name in NAMES if re.search(pattern, name)}
    assert set(extra) == {pattern, "model.layers.1.mlp.gate"} | found  # for tools that know no expressions
    assert all(extra[name] == {"bits": 8} for name in found)
    for name in NAMES:
        assert (re.search(pattern, name) is None) == (re.fullmatch(pattern, name) is None)
    check_exporter(EXPORTERS["auto_round"], case)


def test_a_pattern_that_would_find_too_much_is_replaced():
    case = planned(
        PlanRequest("W4A16", {"group_size": 32}, {"mlp.gate": "BF16", "layers.0.mlp.gate_proj": {"bits": 8}})
    )
    assert ".*mlp\\.gate.*" not in config_of(case)["extra_config"]
    check_exporter(EXPORTERS["auto_round"], case)


schemes = st.one_of(
    st.none(),
    st.builds(
        S,
        bits=st.sampled_from([2, 3, 4, 8]),
        group_size=st.sampled_from([-1, 16, 32]),
        sym=st.booleans(),
        scale_dtype=st.sampled_from(["float16", "bfloat16"]),
    ),
)


@given(
    base=schemes.filter(bool),
    changes=st.dictionaries(st.sampled_from(NAMES), schemes, max_size=6),
    tied=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_readers_find_every_plan(base, changes, tied):
    case = small_case(base, tied=tied, changes=changes)
    if case.plan.quantized:
        check_exporter(EXPORTERS["auto_round"], case)


@pytest.mark.parametrize(
    ("facts", "written"),
    [
        ({}, {}),
        ({"iters": 200, "nsamples": 128, "seqlen": 2048, "batch_size": 8, "amp": True, "lr": None}, {}),
        ({"iters": 50, "seqlen": 512, "lr": 0.02}, {"iters": 50, "seqlen": 512}),
        ({"lr": 0.005, "minmax_lr": 0.005}, {}),
        ({"lr": 0.01, "minmax_lr": 0.01}, {"lr": 0.01}),
        ({"lr": 0.01, "minmax_lr": 0.002}, {"lr": 0.01, "minmax_lr": 0.002}),
        ({"iters": 0, "enable_quanted_input": False}, {"iters": 0, "enable_quanted_input": False}),
    ],
)
def test_facts_that_say_nothing_new_are_left_out(facts, written):
    case = small_case(S(4, 32))
    plain, told = config_of(case), config_of(case, facts)
    assert {k: v for k, v in told.items() if k not in plain} == written
    assert {k: told[k] for k in plain} == plain


def test_facts_cannot_overwrite_the_scheme():
    with pytest.raises(InternalError, match="bits"):
        config_of(small_case(S(4, 32)), {"bits": 8})


def test_transformers_takes_the_config():
    from transformers import AutoRoundConfig

    changes = {"model.layers.0.mlp.up_proj": S(8, 32, sym=False)}
    config = config_of(small_case(S(3, -1, sym=False), head=S(4, 32), changes=changes), {"iters": 50})
    loaded = AutoRoundConfig.from_dict(json.loads(json.dumps(config)))
    assert (loaded.bits, loaded.group_size, loaded.sym, loaded.backend) == (3, -1, False, "auto")
    assert loaded.packing_format == "auto_round"
    assert loaded.extra_config == config["extra_config"]
    assert loaded.iters == 50
    written = loaded.to_dict()
    assert {key: written[key] for key in config} == config
