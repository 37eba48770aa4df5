"""Rounded inputs of experts that share a parameter: what reloads is what was tuned; numbers are as seen."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.errors import UnsupportedError
from auto_round.facts.inputs import expert_of, input_of, owner_of
from auto_round.pipeline.running.input_ranges import InputRanges
from pipeline.runs import ROWS, quantize, weights

SIZES = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
PLAIN = {"iters": 0, "disable_opt_rtn": True}
FORMATS = "auto_round,llm_compressor,fake"
DYNAMIC = {"scheme": "FP8_STATIC", "act_dynamic": True, "act_group_size": -1}


def run(model, out, **given):
    return quantize(model, out, **{"format": FORMATS, "group_size": None, **PLAIN, **given})


@pytest.mark.parametrize(
    "given",
    [
        {"scheme": "NVFP4"},
        {"scheme": "MXFP4", "iters": 2},
        *(
            pytest.param(given, marks=pytest.mark.slow)
            for given in (
                {"scheme": "FP8_STATIC"},
                DYNAMIC,
                {"scheme": "MXFP6"},
                {"scheme": "MXFP8"},
                {"scheme": "INT8_W8A8"},
                {"scheme": "NVFP4", "iters": 2},
            )
        ),
    ],
    ids=str,
)
def test_it_predicts_what_was_tuned(tiny, tmp_path, given):
    """By the packed experts of this package, and by dense ones whose inputs are rounded for the check."""
    pytest.importorskip("compressed_tensors")
    result = run(tiny("qwen3_moe", **SIZES), tmp_path / "out", **given)
    assert any(".experts." in name for name in result.plan.quantized)
    verified, engines = result.report["verified"], result.report["engines"]["llm_compressor"]
    assert max(verified[name]["kl"] for name in ("auto_round", "fake")) < 1e-6
    assert verified["llm_compressor"].get("kl", 0.0) < (1e-2 if given["scheme"].startswith("FP8") else 1e-6)
    lost = given["scheme"] in ("NVFP4", "MXFP8", "INT8_W8A8")  # Transformers misreads such experts
    assert ("skipped" in verified["llm_compressor"]) == lost
    assert engines["Transformers"]["loads"] != lost
    assert engines["vLLM"]["loads"] or given["scheme"] == "MXFP6"


def largest_inputs(model, rows):
    """Largest magnitude of what flows into each expert's first matrix, by Transformers alone."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    found = {}

    def look(name):
        def hook(module, args, kwargs):
            hidden, chosen, _ = [*args, *kwargs.values()]
            for expert in chosen.unique().tolist():
                seen = hidden[(chosen == expert).any(-1)].abs().max()
                key = f"{name}.gate_up_proj[{expert}]"
                found[key] = max(found.get(key, 0.0), float(seen))

        return hook

    for name, module in net.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(look(name), with_kwargs=True)
    with torch.no_grad():
        net(input_ids=torch.tensor(rows))
    return found


def test_scales_are_the_extremes_that_each_expert_saw(tiny, tmp_path):
    """One for gate and up; experts without a token have the largest of their peers, and are counted."""
    sizes = {**SIZES, "num_experts": 12, "num_experts_per_tok": 1}
    model, rows = tiny("qwen3_moe", **sizes), [ROWS[0][:4]] * len(ROWS)
    given = {"scheme": "FP8_STATIC", "format": "llm_compressor", "verify": False, "seqlen": 4}
    result = run(model, tmp_path / "out", dataset=rows, **given)
    stored = weights(result.folders[0])
    seen = largest_inputs(model, rows[:1])
    ranges = InputRanges.from_entries(result.report["blocks"])
    assert ranges.borrowed
    assert result.report["inputs_ranged_by_peers"] == len(ranges.borrowed)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        here = {k: v for k, v in seen.items() if k.startswith(experts)}
        assert here.keys() == {
            name for name in ranges.extremes if owner_of(name) == f"{experts}.gate_up_proj"
        } - set(ranges.borrowed)
        for expert in range(12):
            gate, up = (float(stored[f"{experts}.{expert}.{n}_proj.input_scale"]) for n in ("gate", "up"))
            size = here.get(input_of(f"{experts}.gate_up_proj", expert), max(here.values()))
            assert gate == up == pytest.approx(size / 448, rel=0.02)


def test_names_of_inputs():
    assert input_of("mlp.up_proj.weight", None) == owner_of("mlp.up_proj") == "mlp.up_proj"
    assert input_of("mlp.experts.down_proj", 3) == "mlp.experts.down_proj[3]"
    assert expert_of("mlp.experts.down_proj[3]") == ("mlp.experts.down_proj", 3)
    assert expert_of("mlp.3") is None


def test_experts_that_do_not_say_how_they_compute_are_refused_before_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("auto_round.models.assembled.matrix_experts", lambda *_: None)
    with pytest.raises(UnsupportedError, match="cannot be told apart"):
        run(tiny("qwen3_moe", **SIZES), tmp_path / "out", scheme="MXFP4")
    assert not (tmp_path / "out").exists()
