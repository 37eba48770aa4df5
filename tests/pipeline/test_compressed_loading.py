"""Folders that compressed-tensors unpacks inside Transformers: right numbers, or refused before any work."""

from __future__ import annotations

import json

import pytest

from auto_round.errors import CheckpointError, UnsupportedError
from auto_round.export.formats import llm_compressor
from auto_round.export.formats.llm_compressor import LLMCompressorFormat
from auto_round.pipeline.converting.convert import convert_folder
from pipeline.runs import kl_of, quantize
from sweep.configurations import known_families
from sweep.outcome import save_family

PLAIN = {"iters": 0, "disable_opt_rtn": True, "dataset": None}
EXPERTS = {"head_dim": 16, "moe_intermediate_size": 32}


def test_experts_beside_another_scheme(tiny, tmp_path):
    """Transformers unpacks experts by the first group: by that of eight bits it reads other numbers."""
    pytest.importorskip("compressed_tensors")
    result = quantize(
        tiny("qwen3_moe", **EXPERTS),
        tmp_path / "out",
        format="llm_compressor",
        layer_config={"self_attn": {"bits": 8}},
        iters=1,
    )
    assert kl_of(result)["llm_compressor"] < 1e-3


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({r".*layers\.1\.mlp\.experts.*": {"bits": 16}}, "packed ones only: model.layers.1.mlp.experts"),
        ({".*experts.*down_proj": {"bits": 16}}, "quantize them too, or use the format auto_round"),
        ({r".*layers\.1\.mlp\.experts.*": {"bits": 8}}, "by one scheme"),
        ({".*experts.*down_proj": {"bits": 8}}, "by one scheme"),
    ],
)
def test_experts_of_two_kinds_are_refused(tiny, tmp_path, rule, reason):
    with pytest.raises(UnsupportedError, match=reason):
        quantize(tiny("qwen3_moe", **EXPERTS), tmp_path / "out", format="llm_compressor", layer_config=rule)
    assert not list(tmp_path.iterdir())
    quantize(tiny("qwen3_moe", **EXPERTS), tmp_path / "out", layer_config=rule, **PLAIN)  # as advised


KEPT = {"ignore_layers": "experts"}


@pytest.mark.parametrize(
    ("family", "reason", "given"),
    [
        ("olmo_hybrid", "converts these.*q_conv1d.*use the format auto_round", {}),  # put side by side
        ("hrm_text", "converts these.*gate_up_proj.*use the format auto_round", {}),  # split in two
        ("llama4_text", "other modules in their place.*experts.*use the format auto_round", KEPT),
    ],
)
def test_what_transformers_does_not_load_is_refused_before_work(
    saved_family, tmp_path, family, reason, given
):
    with pytest.raises(UnsupportedError, match=reason):
        quantize(saved_family(family), tmp_path / "out", format="llm_compressor", **PLAIN, **given)
    assert not list(tmp_path.iterdir())


def test_experts_for_which_transformers_has_linear_layers_are_loaded(saved_family, tmp_path):
    pytest.importorskip("compressed_tensors")
    result = quantize(saved_family("llama4_text"), tmp_path / "out", format="llm_compressor", iters=1)
    assert kl_of(result)["llm_compressor"] < 1e-6


@pytest.mark.parametrize(("family", "given"), [("olmo_hybrid", {}), ("llama4_text", KEPT)])
def test_conversions_are_refused_alike(saved_family, tmp_path, family, given):
    quantize(saved_family(family), tmp_path / "packed", verify=False, **PLAIN, **given)
    with pytest.raises(UnsupportedError, match="Transformers"):
        convert_folder(tmp_path / "packed", "llm_compressor", tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["packed"]


def test_weights_that_are_not_found_are_noticed(saved_family, tmp_path, monkeypatch):
    """Transformers only warns, and leaves random numbers."""
    pytest.importorskip("compressed_tensors")
    monkeypatch.setattr(LLMCompressorFormat, "unloadable", lambda *args: [])
    monkeypatch.setattr(llm_compressor, "unread_experts", lambda *args: "")
    with pytest.raises(CheckpointError, match="weights of the model are not found in it"):
        quantize(saved_family("granitemoe"), tmp_path / "out", format="llm_compressor", **PLAIN)


@pytest.mark.parametrize(("family", "kept"), [("gpt_neox", "lm_head"), ("phimoe", r"re:.*\.layers\.\d+\.")])
def test_a_converted_folder_says_what_a_direct_one_says(tiny, tmp_path, family, kept):
    """Also of routers, and of modules with other names than their tensors, as GPT-NeoX's head."""
    source = tiny(family)
    for fmt in ("auto_round", "llm_compressor"):
        quantize(source, tmp_path / fmt, format=fmt, verify=False, scale_dtype="bfloat16", **PLAIN)
    convert_folder(tmp_path / "auto_round", "llm_compressor", tmp_path / "out", verify=False)
    said = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("llm_compressor", "out")
    ]
    assert any(name.startswith(kept) for name in said[0]["ignore"])
    assert said[0] == said[1]


def test_both_reasons_are_given_where_another_format_does_not_help_tuning(saved_family, tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"(?s)use the format auto_round.*use plain rounding"
    ) as refused:
        quantize(saved_family("hrm_text"), tmp_path / "out", format="llm_compressor", iters=1)
    assert [refusal.who for refusal in refused.value.refusals] == ["llm_compressor", "models"]


@pytest.mark.parametrize("form", ["auto_round", "auto_gptq", "llm_compressor"])
def test_a_head_that_is_renamed_as_a_weight_only(tmp_path, tmp_path_factory, form):
    """DeepSeek-V4 has its head as `head.weight`; Transformers renames that, and no `head.qweight`."""
    if "deepseek_v4" not in known_families():
        pytest.skip("this Transformers has no such family")
    source = save_family("deepseek_v4", tmp_path_factory.mktemp("v4"))
    plain = {"iters": 0, "disable_opt_rtn": True, "dataset": None, "quant_lm_head": True}
    with pytest.raises(UnsupportedError, match="only tensors called `weight` under this name on disk: head"):
        quantize(source, tmp_path / "out", format=form, **plain)
    assert not list(tmp_path.iterdir())
