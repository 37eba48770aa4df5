"""A model whose rows the default groups do not divide becomes a folder that loads, in every format."""

from __future__ import annotations

import json

import pytest

from auto_round.log import logger
from pipeline.runs import kl_of, quantize

UNEVEN = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 48}
"""Rows of 192 take groups of 64, those of 256 groups of 128."""


@pytest.mark.parametrize(
    ("name", "down"),
    [("auto_round", 128), ("auto_gptq", 64), ("llm_compressor", 128), ("auto_awq", 64)],
)
def test_reloaded(tiny, tmp_path, caplog, monkeypatch, name, down):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger=logger.name)
    model = tiny("qwen3", **UNEVEN)
    plain = {"iters": 0, "disable_opt_rtn": True, "group_size": None}
    result = quantize(model, tmp_path / "out", format=name, **plain)
    scheme_of = result.plan.scheme_of
    assert scheme_of("model.layers.0.self_attn.q_proj").group_size == 64
    assert scheme_of("model.layers.0.mlp.down_proj").group_size == down
    assert any("groups of 128 do not divide" in warning for warning in result.plan.warnings)
    assert "plan\nquantized:" in caplog.text
    assert [caplog.text.count(warning) for warning in result.plan.warnings] == [1] * len(result.plan.warnings)
    assert kl_of(result)[name] < 1e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"]
    assert all("cannot" not in verdict for verdict in result.report["engines"][name].values())
