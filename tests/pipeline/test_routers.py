"""Routers keep the dtype in which their families want them, while blocks are tuned and in what is written."""

from __future__ import annotations

import pytest
import torch

from auto_round.config import build_options
from auto_round.facts.layer import Role
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.running.block_group import BlockGroup
from auto_round.pipeline.running.tune_group import cast_group
from auto_round.testing.tiny_models import save_tiny_model
from pipeline.runs import SHORT, quantize, weights

ROUTERS = {
    "glm4_moe": "mlp.gate",
    "deepseek_v3": "mlp.gate",
    "nemotron_h": "mixer.gate",
    "deepseek_v2": "mlp.gate",
}
"""Families that declare routers to be float32."""


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_run_in_float32_beside_weights_of_16_bits(family, tmp_path):
    folder = save_tiny_model(family, tmp_path / "m", dtype=torch.bfloat16)
    given = {**SHORT, "group_size": 8, "model": str(folder), "output_dir": str(tmp_path / "out")}
    job = prepare(build_options(given), rows=False)
    assert job.dtype is torch.bfloat16
    found = 0
    for block in job.source.blocks:
        with job.source.block(block.index) as module:
            group = BlockGroup([module], [block.flow])
            cast_group(job, group, [block.index])
            for name, parameter in group.named_parameters():
                routes = name == f"0.{ROUTERS[family]}.weight"
                found += routes
                assert parameter.dtype is (torch.float32 if routes else torch.bfloat16), name
    assert found


def test_they_are_written_as_they_lie_on_disk(tmp_path):
    folder = save_tiny_model("glm4_moe", tmp_path / "m", dtype=torch.bfloat16)
    before = weights(folder)
    assert before["model.layers.1.mlp.gate.weight"].dtype is torch.float32
    quantize(folder, tmp_path / "out", group_size=8, verify=False)
    after = weights(tmp_path / "out")
    for name in ("weight", "e_score_correction_bias"):
        full = f"model.layers.1.mlp.gate.{name}"
        assert after[full].dtype is before[full].dtype
        assert torch.equal(after[full], before[full])


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "phimoe", "mixtral", "lfm2_moe"])
def test_no_router_is_quantized_by_default(family, tmp_path):
    folder = save_tiny_model(family, tmp_path / "m")
    given = {**SHORT, "group_size": 8, "model": str(folder), "output_dir": str(tmp_path / "out")}
    job = prepare(build_options(given), rows=False)
    words = ("gate.weight", "router.weight", "shared_expert_gate.weight")
    routers = {n.removesuffix(".weight") for n in job.source.tensors if n.endswith(words)}
    routers = {name for name in routers if not name.endswith("experts.gate")}
    assert routers
    assert not routers & set(job.plan.quantized)
    assert all(layer.role is Role.ROUTER for layer in job.source.layers if layer.name in routers)
