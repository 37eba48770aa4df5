"""Plans: defaults by role, precedence, shapes, warnings, size, text and JSON."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from auto_round.errors import ConfigError, InternalError, UnsupportedError
from auto_round.facts.layer import Role
from auto_round.numerics.presets import int_format
from auto_round.schemes.condense import condense, some
from auto_round.schemes.make import KEPT_ROLES, make_plan
from auto_round.schemes.plan import Plan, PlanRequest
from auto_round.schemes.plan_text import render_plan
from auto_round.schemes.scheme import QuantizationScheme

W4, W8 = QuantizationScheme(4), QuantizationScheme(8)


@pytest.fixture
def plan(layers, blocks):
    def make(tied_head=False, other_names=(), **request):
        return make_plan(
            layers, PlanRequest(**request), blocks=blocks, tied_head=tied_head, other_names=other_names
        )

    return make


def test_which_roles_are_kept_by_default():
    kept = {Role.ROUTER, Role.OUTSIDE, Role.HEAD, Role.TOWER, Role.MODULATION, Role.FURTHER}
    assert set(KEPT_ROLES) == kept


def test_defaults_by_role(plan, layers):
    made = plan()
    taken = {Role.LINEAR, Role.EXPERT, Role.SHARED_EXPERT}
    assert made.quantized == tuple(layer.name for layer in layers if layer.role in taken)
    assert list(made.entries) == [layer.name for layer in layers]
    assert made.entries["lm_head"].reason.startswith("output head")
    assert made.entries["model.layers.1.mlp.gate"].reason == "router"
    assert made.entries["model.layers.0.mlp.up_proj"].reason == "scheme W4A16"
    assert made.format_of("model.layers.0.mlp.up_proj") == int_format(4, 128, sym=True)
    assert made.format_of("lm_head") is None
    assert made.warnings == ()
    with pytest.raises(InternalError):
        made.format_of("lm_heat")


def test_head_only_when_asked(plan):
    assert plan(quant_lm_head=True).scheme_of("lm_head") == W4
    assert plan(layer_config={"lm_head": "W8A16"}).scheme_of("lm_head") == W8
    assert not plan(quant_lm_head=True).untie_head
    assert not plan(tied_head=True).untie_head
    assert plan(quant_lm_head=True, tied_head=True).untie_head
    assert plan(quant_lm_head=True, ignore_layers="lm_head").scheme_of("lm_head") is None


def test_quant_lm_head_without_a_head(layers):
    with pytest.raises(ConfigError, match="no output head"):
        make_plan(layers[:-1], PlanRequest(quant_lm_head=True))


def test_mixed_recipe(plan, layers):
    made = plan(scheme="W4A16_MIXED", quant_lm_head=True)
    for layer in layers:
        wanted = {Role.EXPERT: 4, Role.ROUTER: None, Role.OUTSIDE: None}.get(layer.role, 8)
        scheme = made.scheme_of(layer.name)
        assert (scheme and scheme.bits) == wanted
    assert plan(scheme="W4A16_MIXED").scheme_of("lm_head") is None


def test_mixed_without_experts_says_so(layers):
    dense = [layer for layer in layers if layer.block == 0]
    assert "this model has none" in make_plan(dense, PlanRequest(scheme="W4A16_MIXED")).warnings[0]


def test_precedence(plan):
    name = "model.layers.3.mlp.shared_expert.down_proj"
    made = plan(
        layer_config={"mlp.*proj": "W2A16", "shared_expert": "W3A16", name: "W8A16"}, ignore_layers="layers.5"
    )
    assert made.scheme_of(name) == W8
    assert made.scheme_of(name.replace("3", "1")).bits == 3
    assert made.scheme_of("model.layers.0.mlp.up_proj").bits == 2
    assert made.entries["model.layers.5.mlp.shared_expert.down_proj"].reason == 'ignore_layers "layers.5"'
    assert made.entries[name].fixed
    assert made.entries[name].reason == f'layer_config "{name}"'
    assert not made.entries["model.layers.0.self_attn.q_proj"].fixed


def test_exact_name_is_stronger_than_ignoring(plan):
    name = "model.layers.5.self_attn.q_proj"
    made = plan(layer_config={name: "W8A16"}, ignore_layers="q_proj")
    assert [n for n in made.quantized if "q_proj" in n] == [name]


def test_patterns_reach_kept_roles_only_when_aimed_at_them(plan):
    wide = plan(layer_config={"mlp": "W8A16", "fc|k_proj": "W8A16"})
    assert wide.scheme_of("model.layers.1.mlp.gate") is None
    assert wide.scheme_of("visual.merger.fc") is None
    assert plan(layer_config={"merger": "W8A16"}).scheme_of("visual.merger.fc") == W8


def test_missing_fields_come_from_the_scheme(plan):
    made = plan(
        scheme="W3A16", overrides={"group_size": 64, "sym": False}, layer_config={"k_proj": {"bits": 8}}
    )
    assert made.scheme_of("model.layers.0.self_attn.k_proj") == QuantizationScheme(8, 64, sym=False)
    assert made.scheme == QuantizationScheme(3, 64, sym=False)


def test_block_restriction(plan, layers):
    made = plan(to_quant_block_names="model.layers.2,language.layers.4", quant_lm_head=True)
    inside = [layer.name for layer in layers if layer.block in (2, 4)]
    assert made.quantized == (*inside, "lm_head")
    assert made.entries["model.layers.3.mlp.gate"].reason == "router"
    assert made.entries["model.layers.0.mlp.up_proj"].reason == "not in to_quant_block_names"
    assert made.block_prefixes == ("model.layers.2", "language.layers.4")


def test_awkward_shapes_are_kept_and_listed(layers):
    odd = [replace(layer, shape=(100, 256)) if "k_proj" in layer.name else layer for layer in layers]
    made = make_plan(odd, PlanRequest(layer_config={"layers.1.self_attn.k_proj": "W8A16"}))
    assert all("k_proj" not in name for name in made.quantized)
    assert made.entries["model.layers.0.self_attn.k_proj"].reason == "out_features 100 is no multiple of 32"
    assert "model.layers.{0-11}.self_attn.k_proj" in made.warnings[0]


def test_group_size_that_does_not_divide(plan):
    with pytest.raises(ConfigError) as caught:
        plan(overrides={"group_size": 256})
    text = str(caught.value)
    assert "model.layers.{1,3,5,7,9,11}.mlp.experts.{0-3}.down_proj" in text
    assert "in_features 128 is no multiple of 256; these sizes fit: 16, 32, 64, 128, -1" in text
    assert "--group_size 128" in text
    assert "--ignore_layers down_proj" in text


@pytest.mark.parametrize("group", [-1, 0, 16, 32, 64, 128])
def test_group_sizes_that_divide(plan, group):
    made = plan(overrides={"group_size": group})
    assert made.format_of("model.layers.1.mlp.experts.0.down_proj").group.size == group


def test_remedies_of_the_group_error_work(plan):
    plan(overrides={"group_size": 256}, ignore_layers="experts")
    plan(overrides={"group_size": 256}, layer_config={"down_proj": {"group_size": 128}})


def test_later_schemes_are_refused_before_work(plan):
    later = {"bits": 4, "super_bits": 6}
    with pytest.raises(UnsupportedError, match="super_bits"):
        plan(overrides=later)
    with pytest.raises(UnsupportedError, match="super_bits"):
        plan(layer_config={"k_proj": later})


def test_fused_siblings_are_warned_about(plan):
    (attention,) = plan(layer_config={"v_proj": "W8A16"}).warnings
    assert attention.startswith("model.layers.{0-11}.self_attn.q_proj/k_proj/v_proj: ")
    (experts,) = plan(layer_config={"experts.2": "W8A16"}).warnings
    assert experts.startswith("model.layers.{1,3,5,7,9,11}.mlp.experts: ")
    (dense,) = plan(ignore_layers="layers.0.mlp.up_proj").warnings
    assert dense.startswith("model.layers.0.mlp.gate_proj/up_proj: gate_proj W4 g128 sym, up_proj 16 bits")
    assert plan(layer_config={"o_proj": "W8A16", "shared_expert": "W8A16"}).warnings == ()


def test_rules_without_effect_are_warned_about(plan):
    made = plan(layer_config={"o_proj": "W8A16", "layers.*o_proj": "W2A16"})
    assert made.warnings[0].startswith('layer_config "layers.*o_proj" has no effect')
    assert "no layer is quantized" in plan(ignore_layers="layers").warnings[-1]


def test_bits_per_weight_counts_codes_steps_and_zeros(plan, layers):
    assert plan().measure(layers).bits_per_weight == 4 + 16 / 128
    asym = plan(overrides={"sym": False, "group_size": 64, "scale_dtype": "fp32"})
    assert asym.measure(layers).bits_per_weight == 4 + (32 + 4) / 64
    assert plan(scheme="BF16").measure(layers).bits_per_weight == 0


def test_size(plan, layers):
    weights = {layer.name: math.prod(layer.shape) for layer in layers}
    made = plan()
    size = replace(made.measure(layers), other_weights=1000, other_bytes=2000)
    quantized = sum(weights[name] for name in made.quantized)
    kept = sum(weights[name] for name in made.kept)
    assert size.quantized_weights == quantized
    assert size.kept_weights == kept
    assert size.total_bytes == quantized * 4.125 / 8 + 2 * kept + 2000
    assert size.source_bytes == 2 * sum(weights.values())
    assert size.bits_per_weight_overall == size.total_bytes * 8 / (quantized + kept + 1000)
    known = dict.fromkeys(made.quantized, 10)
    assert made.measure(layers, stored_bytes=known).quantized_bytes == 10 * len(known)


def test_a_tied_head_is_counted_once(plan, layers):
    head = 3200 * 256
    tied = plan(tied_head=True).measure(layers)
    assert plan().measure(layers).total_bytes - tied.total_bytes == 2 * head
    untied = plan(tied_head=True, quant_lm_head=True).measure(layers)
    assert untied.total_bytes - tied.total_bytes == head * 4.125 / 8
    assert untied.source_bytes == tied.source_bytes


def test_table(plan, layers):
    made = plan(layer_config={"o_proj": {"bits": 8}}, ignore_layers="layers.3.self_attn")
    lines = render_plan(made.entries, layers, made.measure(layers), made.warnings).splitlines()
    rows = [line.split() for line in lines]
    assert [
        "model.layers.{0,2,4,6,8,10}.mlp.down_proj",
        "256x768",
        "W4",
        "g128",
        "sym",
        "4.125",
        "bpw",
    ] in rows
    assert any(row[0] == "model.layers.{0-2,4-11}.self_attn.o_proj" and row[-1] == '"o_proj"' for row in rows)
    assert ["model.layers.3.self_attn.q_proj", "256x256", "ignore_layers", '"layers.3.self_attn"'] in rows
    assert ["model.layers.{1,3,5,7,9,11}.mlp.gate", "4x256", "router"] in rows
    assert lines[-1].startswith("whole model: ")
    assert len(lines) < 40


def test_json_round_trip(plan):
    made = plan(
        scheme="W4A16_MIXED",
        layer_config={"o_proj": {"bits": 8}, "layers.1.*k_proj": "W2A16", "q_proj": "BF16"},
        ignore_layers="layers.3",
        quant_lm_head=True,
        tied_head=True,
        to_quant_block_names="model.layers",
    )
    assert Plan.from_json(made.to_json()) == made
    assert Plan.from_json(made.to_json()).to_json() == made.to_json()


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"schemes": [{"bits": 99}]}', '{"schemes": 3}'])
def test_bad_json(text):
    with pytest.raises(ConfigError):
        Plan.from_json(text)


def test_same_request_gives_the_same_plan(plan):
    request = {"layer_config": {"k_proj": "W8A16"}, "ignore_layers": "layers.1"}
    assert plan(**request).to_json() == plan(**request).to_json()


def test_condense_covers_exactly():
    names = [f"a.{i}.b.{j}.c" for i in range(5) for j in range(3) if (i, j) != (2, 1)] + ["a.b", "a.01"]
    assert [str(s) for s in condense(names)] == ["a.{0-1,3-4}.b.{0-2}.c", "a.2.b.{0,2}.c", "a.b", "a.01"]
    assert [s.first for s in condense(names)] == ["a.0.b.0.c", "a.2.b.0.c", "a.b", "a.01"]


def test_some_says_how_many_sets_it_leaves_out():
    names = ["a.0.x", "a.1.x", "b", "c", "d"]
    assert some(names) == "a.{0-1}.x, b, c and 1 more"
    assert some(names, most=1) == "a.{0-1}.x and 3 more"
    assert some(names, most=4) == "a.{0-1}.x, b, c, d"


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4", "INT8_W8A8", "FP8_STATIC"])
def test_layers_of_16_bits_are_kept_with_their_inputs(plan, scheme):
    made = plan(scheme=scheme, layer_config={"o_proj": {"bits": 16}})
    kept = [name for name in made.entries if name.endswith("o_proj")]
    assert kept
    assert all(made.format_of(name) is None and made.activation_of(name) is None for name in kept)
    assert made.quantized
