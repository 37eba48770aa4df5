"""Layers that share a scheme."""

from __future__ import annotations

import pytest
import torch

from auto_round.autoscheme.groups import group_layers, nothing_fused
from auto_round.errors import ConfigError
from auto_round.facts.layer import Layer, Role

LASTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def layer(name: str, block: int | None, parameter: str = "") -> Layer:
    return Layer(
        name, f"{name}.weight", parameter or f"{name}.weight", (64, 64), torch.bfloat16, block, Role.LINEAR
    )


LAYERS = [layer(f"model.layers.{b}.{last}", b) for b in range(2) for last in (*LASTS, *MLP)]
NAMES = [x.name for x in LAYERS]


def short(groups: list[tuple[str, ...]]) -> list[set[str]]:
    return [{".".join(name.split(".")[-3:]) for name in names} for names in groups]


def test_engines_fuse_q_k_v_and_gate_up() -> None:
    found = short(group_layers(LAYERS, NAMES))
    assert found[:4] == [
        {"0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"},
        {"0.self_attn.o_proj"},
        {"0.mlp.gate_proj", "0.mlp.up_proj"},
        {"0.mlp.down_proj"},
    ]
    assert len(found) == 8


def test_each_layer_by_itself_where_nobody_fuses() -> None:
    found = group_layers(LAYERS, NAMES, [["gate_proj", "up_proj"]], fused=nothing_fused)
    assert sum(len(names) == 1 for names in found) == 2 * 5
    assert {"1.mlp.gate_proj", "1.mlp.up_proj"} in short(found)


@pytest.mark.parametrize("pattern", ["o_proj", "*.self_attn.o_proj", "self_attn\\.o_.*"])
def test_patterns_join_inside_each_block(pattern: str) -> None:
    found = short(group_layers(LAYERS, NAMES, [[pattern, "v_proj"]]))
    assert found[0] == {f"0.{last}" for last in LASTS}
    assert found[3] == {f"1.{last}" for last in LASTS}


def test_exact_names_join_wherever_they_are() -> None:
    pair = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert {"0.mlp.down_proj", "1.mlp.down_proj"} in short(group_layers(LAYERS, NAMES, [pair]))


def test_what_is_not_chosen_is_in_no_group() -> None:
    chosen = [name for name in NAMES if not name.endswith("k_proj")]
    assert short(group_layers(LAYERS, chosen))[0] == {"0.self_attn.q_proj", "0.self_attn.v_proj"}


def test_matrices_of_one_parameter_and_the_experts_of_a_block_join() -> None:
    stacked = [layer(f"m.layers.0.ffn.part{i}", 0, "m.layers.0.ffn.stack") for i in range(3)]
    assert len(group_layers(stacked, [x.name for x in stacked])) == 1
    experts = [
        layer(f"m.layers.0.mlp.experts.{e}.{n}", 0) for e in range(3) for n in ("up_proj", "down_proj")
    ]
    assert len(group_layers(experts, [x.name for x in experts])) == 1


def test_a_malformed_pattern_is_refused_by_its_own_option() -> None:
    with pytest.raises(ConfigError, match=r'shared_layers "\(o_proj" is not a valid'):
        group_layers(LAYERS, NAMES, [["(o_proj"]])


@pytest.mark.parametrize("key", ["o_prj", "*.o_prj", "model.layers.7.mlp.down_proj"])
def test_a_pattern_that_matches_nothing_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"shared_layers .* matches no layer.*"):
        group_layers(LAYERS, NAMES, [["v_proj", key]])
