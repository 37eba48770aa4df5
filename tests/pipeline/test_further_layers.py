"""Layers for multi-token prediction have no module in Transformers: copied, or rounded without data."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import ConfigError
from auto_round.facts.layer import Role
from auto_round.layouts.table import layout_for
from auto_round.models.folder import FolderSource
from auto_round.numerics.presets import int_format
from auto_round.testing.tiny_models import save_tiny_model
from pipeline.runs import SIZES, quantize, weights

MOE = {"moe_intermediate_size": 32, "head_dim": 16}
PLAIN = {"iters": 0, "disable_opt_rtn": True, "dataset": None}
LIKE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    *(f"mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")),
)
"""Layers of a further block that are like those of the blocks."""


@pytest.fixture(scope="module", params=["mtp.layers.0", "model.layers.2"])
def further(request, tmp_path_factory):
    """A model with one more block on disk, which its configuration does not count, and where that lies."""
    folder = save_tiny_model(
        "qwen3_moe", tmp_path_factory.mktemp("m") / "m", dtype=torch.bfloat16, **SIZES, **MOE
    )
    tensors = load_file(folder / "model.safetensors")
    last = "model.layers.1."
    more = {n.replace(last, f"{request.param}."): -t for n, t in tensors.items() if n.startswith(last)}
    more[f"{request.param}.eh_proj.weight"] = torch.randn(64, 128).bfloat16()
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, request.param


def test_they_are_found_by_what_they_are_like(further):
    folder, prefix = further
    with FolderSource.open(folder) as source:
        found = [layer for layer in source.layers if layer.role is Role.FURTHER]
        assert {layer.name for layer in found} == {f"{prefix}.{name}" for name in LIKE}
        assert all(layer.block is None for layer in found)
        (row,) = [
            r for r in source.roles if r.names.endswith("self_attn.o_proj") and r.role == "further layer"
        ]
        assert "--quant_mtp" in row.note


@pytest.mark.parametrize("given", [PLAIN, {"iters": 1}], ids=["plain", "tuned"])
def test_they_are_copied_and_listed(further, tmp_path, given):
    folder, prefix = further
    result = quantize(folder, tmp_path / "out", **given)
    before, after = weights(folder), weights(tmp_path / "out")
    names = [name for name in before if name.startswith(f"{prefix}.")]
    assert len(names) > len(LIKE)
    assert all(torch.equal(before[name], after[name]) for name in names)
    kept = [line for line in result.report["plan"] if "--quant_mtp" in line["reason"]]
    assert sum(line["layers"] for line in kept) == len(LIKE)


@pytest.mark.parametrize("given", [PLAIN, {"iters": 1}], ids=["plain", "tuned"])
def test_they_are_rounded_without_data(further, tmp_path, given):
    folder, prefix = further
    quantize(folder, tmp_path / "out", quant_mtp=True, **given)
    before, after = weights(folder), weights(tmp_path / "out")
    layout, fmt = layout_for("auto_round:auto_gptq"), int_format(4, 32, sym=True)
    for name in LIKE:
        parts = {s: after[f"{prefix}.{name}.{s}"] for s in ("qweight", "qzeros", "scales")}
        shape = before[f"{prefix}.{name}.weight"].shape
        got = layout.unpack(parts, fmt, shape)
        error = (
            (fmt.dequantize(got, torch.float32) - before[f"{prefix}.{name}.weight"].float()).square().sum()
        )
        plain = fmt.quantize(before[f"{prefix}.{name}.weight"].float())
        bound = (
            (fmt.dequantize(plain, torch.float32) - before[f"{prefix}.{name}.weight"].float()).square().sum()
        )
        assert error <= bound * 1.001
        assert f"{prefix}.{name}.weight" not in after
    for name in ("mlp.gate", "eh_proj", "input_layernorm"):
        assert torch.equal(after[f"{prefix}.{name}.weight"], before[f"{prefix}.{name}.weight"])


def test_a_model_without_them_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="no layers for multi-token prediction"):
        quantize(tiny("qwen3", head_dim=16), tmp_path / "out", quant_mtp=True, **PLAIN)
