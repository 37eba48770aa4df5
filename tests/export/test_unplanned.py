"""Matrices that no plan knows are kept by name, so that no reader takes them for quantized."""

from __future__ import annotations

import torch

from auto_round.export.table import EXPORTERS
from auto_round.export.unplanned import with_unplanned
from auto_round.facts.tensor import TensorSpec
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.testing.config_reader import READERS
from auto_round.testing.exporter_kit import expert_case

S = QuantizationScheme
FURTHER = {
    "model.layers.0.mlp.router.weight": (4, 64),
    "model.layers.1.conv.weight": (64, 1, 4),
    "model.layers.0.mixer.experts.gate_up_proj": (4, 64, 64),
    "model.layers.2.self_attn.o_proj.weight": (64, 64),
    "mtp.fc.weight": (64, 128),
    "model.layers.0.norm.weight": (64,),
    "model.layers.0.table": (4, 64),
    "model.layers.0.self_attn.slope_rate": (4, 1, 1),
    "model.layers.1.self_attn.states": (4, 16, 16),
    "model.layers.1.mlp.scale.weight": (1, 64),
    "model.wte.weight": (96, 64),
}
MODULES = [
    "model.layers.0.mlp.router",
    "model.layers.1.conv",
    "model.layers.0.mixer.experts",
    "model.layers.2.self_attn.o_proj",
    "mtp.fc",
]


def test_readers_leave_them_alone():
    case = expert_case(S(4, 32), experts=S(4, 32))
    tensors = {**case.tensors, **{n: TensorSpec(torch.bfloat16, shape) for n, shape in FURTHER.items()}}
    plan, layers = with_unplanned(case.plan, case.layers, case.blocks, tensors)
    assert [layer.name for layer in layers[len(case.layers) :]] == MODULES
    assert [layer.block for layer in layers[len(case.layers) :]] == [0, 1, 0, None, None]
    assert plan.quantized == case.plan.quantized
    for name in ("auto_round", "auto_gptq", "gptqmodel", "auto_awq"):
        config = EXPORTERS[name].for_plan(plan, layers).config(plan, layers, case.blocks)
        for read in READERS[config["quant_method"]].values():
            assert not any(read(config, module, plan.quantized) for module in MODULES)
            assert all(read(config, layer, plan.quantized) for layer in plan.quantized)


def test_a_plan_of_all_matrices_stays_as_it_is():
    case = expert_case(S(4, 32), experts=None)
    assert with_unplanned(case.plan, case.layers, case.blocks, case.tensors) == (case.plan, case.layers)
