"""FP8 scales of keys, values and queries: what was seen, under the names that readers look for."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from auto_round.config import build_options
from auto_round.errors import AutoRoundError, ConfigError, UnsupportedError
from auto_round.numerics.head_steps import HeadSteps
from auto_round.pipeline.running.attention_states import StateRanges
from pipeline.runs import ROWS, Stop, kl_of, quantize, stop_after, tree, weights

PLAIN = {"iters": 0, "disable_opt_rtn": True, "format": "llm_compressor", "verify": False}
EXPERTS = {"moe_intermediate_size": 32}
ALIKE = [ROWS[0]] * len(ROWS)
"""All rows alike: what flows through them does not depend on how they are drawn."""


def seen_by_transformers(model):
    """Largest magnitude by head of what each layer's attention gets: `[heads]` of q, k and v."""
    found = []

    def look(module, query, key, value, attention_mask, **options):
        found.append(
            {
                part: x.abs().amax((0, 2, 3)).float()
                for part, x in zip("qkv", (query, key, value), strict=True)
            }
        )
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)

    AttentionInterface.register("looked_at", look)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa")
    net.config._attn_implementation = "looked_at"
    with torch.no_grad():
        net(input_ids=torch.tensor(ALIKE[:1]))
    return found


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("kind", ["kv", "attention"])
def test_scales_are_what_was_seen(tiny, tmp_path, kind, granularity):
    given = {f"static_{kind}_dtype": "fp8", f"static_{kind}_granularity": granularity}
    result = quantize(tiny("llama"), tmp_path / "out", dataset=ALIKE, **PLAIN, **given)
    stored = weights(result.folders[0])
    parts = "kv" if kind == "kv" else "qkv"
    scales = {
        name: t for name, t in stored.items() if name.rpartition(".")[2] in ("q_scale", "k_scale", "v_scale")
    }
    wanted = seen_by_transformers(tiny("llama"))
    assert len(scales) == len(wanted) * len(parts)
    for layer, largest in enumerate(wanted):
        for part in parts:
            scale = scales[f"model.layers.{layer}.self_attn.{part}_scale"]
            sizes = largest[part] if granularity == "head" else largest[part].amax().reshape(1)
            assert scale.shape == ((len(sizes), 1, 1) if granularity == "head" else (1,))
            torch.testing.assert_close(scale.flatten().float(), sizes / 448, rtol=0.02, atol=0)
    config = json.loads((result.folders[0] / "config.json").read_text())["quantization_config"]
    scheme = config["kv_cache_scheme"]
    assert scheme["strategy"] == {"tensor": "tensor", "head": "attn_head"}[granularity]
    assert (scheme["type"], scheme["num_bits"], scheme["dynamic"], scheme["symmetric"]) == (
        "float",
        8,
        False,
        True,
    )


def test_the_library_reads_the_configuration(tiny, tmp_path):
    library = pytest.importorskip("compressed_tensors.quantization")
    result = quantize(
        tiny("llama"), tmp_path / "out", **PLAIN, static_kv_dtype="fp8", static_kv_granularity="head"
    )
    config = json.loads((result.folders[0] / "config.json").read_text())["quantization_config"]
    read = library.QuantizationConfig.model_validate(config)
    assert read.kv_cache_scheme.strategy == library.QuantizationStrategy.ATTN_HEAD


@pytest.mark.parametrize(
    "given",
    [
        {"static_kv_dtype": "fp8"},
        pytest.param(
            {"static_attention_dtype": "fp8", "static_attention_granularity": "head"}, marks=pytest.mark.slow
        ),
    ],
)
def test_what_reloads_is_what_was_tuned_with_rounded_caches(tiny, tmp_path, given):
    pytest.importorskip("compressed_tensors")
    plain, rounded = (
        quantize(tiny("llama"), tmp_path / str(i), format="llm_compressor", scheme="W8A16", **more)
        for i, more in enumerate(({}, given))
    )
    assert kl_of(rounded)["llm_compressor"] < 1e-3
    # Keys and values are rounded in the run, too.
    assert rounded.report["held_out"]["perplexity_after"] != plain.report["held_out"]["perplexity_after"]


def test_a_continued_run_gives_the_same_bytes(tiny, tmp_path):
    given = {**PLAIN, "static_kv_dtype": "fp8"}
    quantize(tiny("llama"), tmp_path / "whole", **given)
    with pytest.raises(Stop):
        quantize(tiny("llama"), tmp_path / "out", progress=stop_after(1), **given)
    quantize(tiny("llama"), tmp_path / "out", **given)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"format": "auto_round"}, "use the format llm_compressor"),
        ({"format": "fake"}, "use the format llm_compressor"),
        ({"format": "gguf:q4_k_m", "group_size": None}, "use the format llm_compressor"),
        ({"dataset": []}, "row"),
    ],
)
def test_refusals_come_before_any_work(tiny, tmp_path, given, said):
    with pytest.raises(AutoRoundError, match=said):
        quantize(tiny("llama"), tmp_path / "out", **{**PLAIN, "static_kv_dtype": "fp8", **given})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "said"),
    [("bloom", "by itself|no block"), ("gpt_oss", "by itself"), ("deepseek_v3", "latent vectors")],
)
def test_models_whose_keys_and_values_cannot_be_looked_at_are_refused(tiny, tmp_path, family, said):
    sizes = EXPERTS if family == "deepseek_v3" else {}
    kept = {"ignore_layers": "experts"} if family == "gpt_oss" else {}  # they cannot be written either
    with pytest.raises(UnsupportedError, match=said):
        quantize(tiny(family, **sizes), tmp_path / "out", **{**PLAIN, **kept, "static_kv_dtype": "fp8"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "sizes"), [("starcoder2", {}), ("qwen3_moe", {"head_dim": 16, **EXPERTS})]
)
@pytest.mark.slow
def test_families(tiny, tmp_path, family, sizes):
    given = {"static_attention_dtype": "fp8", "static_attention_granularity": "head"}
    result = quantize(
        tiny(family, **sizes), tmp_path / "out", **{**PLAIN, "verify": True}, scheme="W8A16", **given
    )
    assert sum(name.endswith("q_scale") for name in weights(result.folders[0])) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"static_kv_dtype": "nvfp4"}, "not there yet; use fp8"),
        ({"static_kv_dtype": "int3"}, "expected fp8"),
        ({"static_kv_dtype": "fp8", "static_kv_granularity": "token"}, "tensor, head"),
        ({"static_kv_granularity": "head"}, "without static_kv_dtype"),
        (
            {
                "static_kv_dtype": "fp8",
                "static_kv_granularity": "tensor",
                "static_attention_dtype": "fp8",
                "static_attention_granularity": "head",
            },
            "contradict",
        ),
    ],
)
def test_options_that_cannot_be(given, said):
    with pytest.raises(ConfigError, match=said):
        build_options({"model": "m", **given})


@pytest.mark.parametrize("word", ["fp8", "FP8", "float8_e4m3fn", torch.float8_e4m3fn])
def test_spellings(word):
    assert build_options({"model": "m", "static_kv_dtype": word}).cache.static_kv_dtype == "fp8"


def test_steps_of_heads_in_plain_python():
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    largest = x.abs().amax((0, 2, 3)) / torch.tensor([1.0, 1.0, 2.0])  # the last head saturates
    for sizes in (largest, largest.amax().reshape(1)):
        steps = HeadSteps.of(sizes, torch.bfloat16)
        assert torch.equal(steps.step, (sizes / 448).bfloat16())
        step = steps.step.float().reshape(1, -1, 1, 1)
        codes = (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert torch.equal(steps.round(x), codes * step)
        assert torch.equal(steps.round(steps.round(x)), steps.round(x))
    assert not HeadSteps.of(torch.zeros(1), torch.bfloat16).round(torch.zeros(1, 1, 2, 8)).any()


def test_tokens_that_do_not_count_are_not_looked_at():
    seen = StateRanges()
    x = torch.tensor([[[[1.0, -2.0], [50.0, 3.0]], [[0.5, 0.0], [-70.0, 1.0]]]])
    seen.add({"k": x}, torch.tensor([[True, False]]))
    assert seen.largest["k"].tolist() == [2.0, 0.5]
    seen.add({"k": x}, None)
    assert seen.largest["k"].tolist() == [50.0, 70.0]
