"""Whole runs on a device apart from the host; `test_other_devices.py` runs this in its own process."""

from __future__ import annotations

import pytest
import torch

import stand_in_device as device
from auto_round.numerics import compiled_correlated, compiled_rounding
from pipeline.runs import ROWS, SIZES, quantize, tree
from sweep.configurations import known_families
from sweep.outcome import save_family

PADDED = [
    {"input_ids": ids[: 16 - i] + [0] * i, "attention_mask": [1] * (16 - i) + [0] * i}
    for i, ids in zip([0, 3, 5, 0, 1, 2, 7, 4] * 2, ROWS, strict=False)
]
SHORTEST = {"nsamples": 2, "iters": 1, "verify": False}
slow = pytest.mark.slow


@pytest.fixture
def same_sums(monkeypatch):
    """The host adds in the order in which the stand-in does: where a matrix lies is then all that differs.

    Two of the C programs for CPUs add in an order of their own.
    """
    monkeypatch.setattr(compiled_correlated, "_program", lambda: None)
    monkeypatch.setattr(compiled_rounding, "_multiplies", lambda: False)


def model_for(tiny, family, given):
    """One block is enough for the shortest runs."""
    return tiny(family, num_hidden_layers=1) if given.items() >= SHORTEST.items() else tiny(family)


def test_the_device_keeps_apart_from_the_host():
    with device.OnDevice():
        x = torch.ones(3, 4).to(device.DEVICE)
        assert x.device == device.DEVICE
        assert (x.sum() + torch.tensor(1.0)).item() == 13
        assert x[torch.tensor([0, 2])].device == device.DEVICE
        for wrong in (
            lambda: x + torch.ones(3, 4),
            lambda: torch.ones(3, 4) @ x.t(),
            lambda: x[0] * torch.ones(1),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()


@pytest.mark.parametrize(
    ("family", "given"),
    [
        pytest.param("qwen3", {"dataset": PADDED}, marks=slow),
        pytest.param("llama", {"low_gpu_mem_usage": True}, marks=slow),
        pytest.param("llama", {"enable_alg_ext": True, "dataset": PADDED}, marks=slow),
        pytest.param("llama", {"iters": 0}, marks=slow),
        pytest.param("llama", {"iters": 0, "disable_opt_rtn": True}, marks=slow),
        pytest.param(
            "llama",
            {"bits": 2, "sym": False, "quant_lm_head": True, "enable_norm_bias_tuning": True, "nblocks": 2},
            marks=slow,
        ),
        pytest.param("llama", {"group_size": 0, "enable_adam": True, "format": "fake"}, marks=slow),
        pytest.param("llama", {"scheme": "INT8", "group_size": None, "format": "fake"}, marks=slow),
        pytest.param("gemma3_text", {}, marks=slow),
        pytest.param("qwen3_moe", {}, marks=slow),
        pytest.param(
            "qwen3_moe",
            {"device_map": {"": device.NAME, "mlp.experts": "cpu"}, "group_size": 16, "format": "fake"},
            marks=slow,
        ),
    ],
)
def test_runs(tiny, tmp_path, family, given):
    model = model_for(tiny, family, given)
    with device.OnDevice():
        result = quantize(model, tmp_path / "out", **{"device_map": "auto", **given})
    assert all(
        figures["kl"] < 0.03 for figures in result.report.get("verified", {}).values() if "kl" in figures
    )


@slow
@pytest.mark.parametrize(
    "given", [{}, {"distill_steps": 2, "distill_nsamples": 2}, {"scheme": "MXFP4"}], ids=str
)
@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text", "glm_moe_dsa", "deepseek_v4"])
def test_what_blocks_hand_on(tmp_path, family, given):
    """Several hidden states of a token, keys and values, choices of tokens."""
    if family not in known_families():
        pytest.skip("this Transformers has no such family")
    model = save_family(family, tmp_path / "model")
    given = {"amp": False, "group_size": None if "scheme" in given else 32, **given}
    with device.OnDevice():
        result = quantize(model, tmp_path / "out", **{"device_map": "auto", **given})
    assert result.report["verified"]["auto_round"]["kl"] < 1e-5


@pytest.mark.parametrize(
    ("family", "placed", "given"),
    [
        pytest.param("qwen3", {"mlp": "cpu"}, SHORTEST | {"dataset": PADDED}, id="padded"),
        pytest.param("llama", {r"layers\.1": "cpu", "lm_head": "cpu"}, {"quant_lm_head": True}, marks=slow),
        pytest.param("qwen3_moe", {"mlp.experts": "cpu"}, {}, marks=slow),
        pytest.param("llama", {"k_proj": "cpu"}, {}, marks=slow),
        pytest.param("llama", {"q_proj": "cpu"}, {"iters": 0}, marks=slow),
        pytest.param("llama", {"q_proj": "cpu"}, {"iters": 0, "disable_opt_rtn": True}, marks=slow),
        pytest.param(
            "llama", {"up_proj": "cpu"}, {"enable_norm_bias_tuning": True, "enable_adam": True}, marks=slow
        ),
    ],
)
@pytest.mark.usefixtures("same_sums")
def test_matrices_are_tuned_where_they_are_placed(tiny, tmp_path, family, placed, given):
    model = model_for(tiny, family, given)
    with device.OnDevice():
        quantize(model, tmp_path / "one", device_map="auto", **given)
        quantize(model, tmp_path / "two", device_map={"": device.NAME, **placed}, **given)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


DIVIDED = {r"experts\.[0-3]\.": "cpu", r"experts\.6\.": "cpu"}
"""With twelve tokens some of the eight experts have none in some batch."""


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("qwen3_moe", {"iters": 1, "verify": False, "dataset": PADDED}),
        pytest.param("qwen3_moe", {"enable_adam": True, "iters": 4}, marks=slow),
        pytest.param("qwen3_moe", {"enable_norm_bias_tuning": True, "quant_lm_head": True}, marks=slow),
        pytest.param("qwen3_moe", {"enable_deterministic_algorithms": True, "iters": 2}, marks=slow),
        pytest.param(
            "qwen3_moe", {"scheme": "MXFP4", "group_size": None, "act_bits": 16, "format": "fake"}, marks=slow
        ),
        pytest.param("gpt_oss", {"dataset": PADDED}, marks=slow),
        pytest.param("qwen3_moe", {"iters": 0}, marks=slow),
        pytest.param("qwen3_moe", {"iters": 0, "disable_opt_rtn": True}, marks=slow),
        pytest.param("deepseek_v3", {"nblocks": 2}, marks=slow),
    ],
)
@pytest.mark.usefixtures("same_sums")
def test_experts_of_one_parameter_lie_on_two_devices(tiny, tmp_path, family, given):
    many = {"deepseek_v3": "n_routed_experts", "gpt_oss": "num_local_experts"}.get(family, "num_experts")
    inner = "intermediate_size" if family == "gpt_oss" else "moe_intermediate_size"
    model = tiny(family, **SIZES | {many: 8, "num_experts_per_tok": 3, inner: 32})
    for folder, placed in (("one", {}), ("two", DIVIDED)):
        with device.OnDevice():
            quantize(model, tmp_path / folder, device_map={"": device.NAME, **placed}, **given)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@slow
@pytest.mark.parametrize("given", [{"iters": 2}, {"iters": 0}])
def test_gguf_files(tmp_path, given):
    """Two-level scales and what is measured of inputs."""
    pytest.importorskip("gguf")
    from export.gguf.small_models import save_small_model

    model = save_small_model("llama", tmp_path / "model", hidden_size=256)
    given |= {"format": "gguf:q4_k_m", "save_imatrix": str(tmp_path / "imatrix.gguf"), "group_size": None}
    with device.OnDevice():
        result = quantize(model, tmp_path / "out", device_map="auto", **given)
    assert (tmp_path / "imatrix.gguf").exists()
    assert result.folders
