"""Matrices on several devices: which go where, by rules or spread, and what moves when a block runs."""

from __future__ import annotations

import math

import pytest
import torch

from auto_round.config import build_options
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.pipeline.deciding.placement import ExpertsOnDevice, module_of, place_layers
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.machine.device import Devices
from auto_round.pipeline.running.placed import put_modules
from pipeline.runs import ROWS, SHORT

CPU, META = torch.device("cpu"), torch.device("meta")
ONE, TWO = torch.device("cuda", 1), torch.device("cuda", 2)


@pytest.fixture(scope="module")
def source(tiny):
    """A model with experts: one module holds all of a block."""
    return prepare(
        build_options({**SHORT, "model": str(tiny("qwen3_moe", head_dim=16)), "output_dir": "out"}),
        dataset=ROWS,
    ).source


def placed(source, *rules, main=CPU):
    others = tuple(dict.fromkeys(device for _, device in rules if device != main))
    return place_layers(Devices(main, others, rules), source).elsewhere


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("mlp.experts", 2),
        ("q_proj", 2),
        ("model.layers.1", 5),
        ("model.layers.1.self_attn.q_proj", 1),
        (r"layers\.0\..*_proj$", 5),
        ("lm_head", 1),
        ("model.norm", 0),
        ("model.embed_tokens", 0),
    ],
)
def test_names_and_patterns(source, key, count):
    found = placed(source, (key, ONE))
    assert len(found) == count
    assert set(found.values()) <= {ONE}


def test_the_narrower_name_wins(source):
    found = placed(source, ("model.layers.0", ONE), ("layers.0.self_attn.q_proj", TWO), ("layers", TWO))
    assert found["model.layers.0.self_attn.q_proj"] == TWO
    assert found["model.layers.0.self_attn.k_proj"] == ONE
    assert found["model.layers.1.self_attn.k_proj"] == TWO


def test_every_expert_by_its_name(source):
    names = [a.name.split("layers.0.")[1] for a in source.layers if "layers.0.mlp.experts" in a.name]
    assert placed(source, *((name, ONE) for name in names))["model.layers.0.mlp.experts"] == ONE


@pytest.mark.parametrize("key", ["mlp.expert.3", "layers.7", r"^nothing.*"])
def test_a_name_that_finds_nothing_is_refused(source, key):
    with pytest.raises(ConfigError, match=r"device_map .* matches no layer; (did you mean|known: .q_proj)"):
        placed(source, (key, ONE))


def test_experts_of_one_module_are_divided(source):
    found = place_layers(Devices(CPU, (ONE, TWO), (("experts.0", ONE), (r"experts\.[12]\.", TWO))), source)
    module = "model.layers.0.mlp.experts"
    assert found.divided[module] == (
        ExpertsOnDevice((0,), ONE),
        ExpertsOnDevice((1, 2), TWO),
        ExpertsOnDevice((3,), CPU),
    )
    assert found.devices == (CPU, ONE, TWO)
    assert found.kinds[:2] == [f"{module} 0-0: cuda", f"{module} 1-2: cuda"]
    at = {a.expert: (found.of(a), found.piece_of(a)) for a in source.layers if module_of(a) == module}
    assert at == {0: (ONE, (0, 0)), 1: (TWO, (1, 0)), 2: (TWO, (1, 1)), 3: (CPU, (2, 0))}
    assert found.devices_inside({"0": "model.layers.0"}) == {
        "0.mlp.experts.pieces.0": ONE,
        "0.mlp.experts.pieces.1": TWO,
        "0.mlp.experts.pieces.2": CPU,
    }


def test_matrices_of_one_expert_stay_together(source):
    with pytest.raises(UnsupportedError, match="share a device"):
        placed(source, (r"experts\.0\.down_proj", ONE))


def test_experts_that_do_not_say_how_they_compute_stay_together(source):
    with pytest.raises(UnsupportedError, match="share a device"):
        place_layers(Devices(CPU, (ONE,), (("experts.0", ONE),)), Undividable(source))


def test_experts_whose_inputs_are_rounded_stay_together(tiny):
    given = {
        **SHORT,
        "model": str(tiny("qwen3_moe", moe_intermediate_size=32)),
        "output_dir": "out",
        "format": "fake",
    }
    job = prepare(build_options({**given, "scheme": "INT8", "group_size": None}), dataset=ROWS)
    with pytest.raises(UnsupportedError, match="flows into its experts is rounded"):
        place_layers(Devices(CPU, (ONE,), (("experts.0", ONE),)), job.source, job.plan)
    assert not place_layers(Devices(CPU, (ONE,)), job.source, job.plan).divided


class Undividable:
    """The model with experts of an unknown kind."""

    def __init__(self, source):
        self.layers, self.tensors = source.layers, source.tensors

    def tells_experts_apart(self, parameter):
        return False


def test_matrices_are_spread_evenly(source):
    found_at = place_layers(Devices(CPU, (ONE, TWO)), source)
    held = {CPU: 0, ONE: 0, TWO: 0}
    for layer in source.layers:
        if layer.block == 0:
            held[found_at.of(layer)] += math.prod(layer.shape)
    largest = max(math.prod(a.shape) for a in source.layers if a.block == 0)
    assert max(held.values()) - min(held.values()) <= 3 * largest
    pieces = found_at.divided["model.layers.0.mlp.experts"]
    assert sorted(e for piece in pieces for e in piece.experts) == [0, 1, 2, 3]
    assert all(piece.experts[-1] - piece.experts[0] == len(piece.experts) - 1 for piece in pieces)


def test_one_device_spreads_nothing(source):
    assert not place_layers(Devices(CPU), source).elsewhere


def test_what_flows_is_fetched_and_handed_back(source):
    """On the meta device nothing is computed, and where tensors are can be seen."""
    seen = []
    with source.block(0) as block:
        put_modules(block, {"self_attn.q_proj": META, "mlp.experts": META}, CPU)
        assert block.self_attn.q_proj.weight.device == META
        assert {p.device for p in block.mlp.experts.parameters()} == {META}
        assert block.self_attn.k_proj.weight.device == CPU
        q_proj = block.self_attn.q_proj
        q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].device))
        with pytest.raises((NotImplementedError, RuntimeError)):  # numbers do not come back from there
            q_proj(torch.ones(1, 2, q_proj.in_features, dtype=q_proj.weight.dtype))
    assert seen == [META]
