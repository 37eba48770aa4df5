"""A chosen mixture is written in every format that holds it, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from auto_round.autoscheme.runs import Given, choose_schemes
from auto_round.config import build_options
from auto_round.errors import UnsupportedError
from auto_round.models.families import FLOWS, LISTS
from auto_round.pipeline.quantize import run
from auto_round.pipeline.result import Result
from auto_round.testing.tiny_models import tiny_model
from export.gguf.small_models import save_small_model
from pipeline.runs import SHORT, token_rows
from pipeline.two_streams import BLOCK, FLOW, TWO_LISTS, TwoListConfig, TwoListForCausalLM, register
from sweep.multimodal import model_config
from sweep.outcome import save_config

ROWS = token_rows(4, 16)


def mixed(model: Path, out: Path, rows: Any = ROWS, **given: Any) -> Result:
    """A chosen mixture, rounded plainly and written."""
    wanted = {"iters": 0, "disable_opt_rtn": True, "score_nsamples": 3, "score_seqlen": 16, "avg_bits": 6}
    wanted |= {"group_size": None} if "scheme_options" in given else {"scheme_options": "W4A16,W8A16"}
    options = build_options({**SHORT, "model": str(model), "output_dir": str(out), **wanted, **given})
    (chosen,) = choose_schemes(options, given=Given(dataset=rows))
    result = run(chosen, dataset=rows)
    schemes = {result.plan.scheme_of(name) for name in result.plan.quantized}
    assert len(schemes) > 1, "a mixture"
    return result


def configuration(result: Result) -> dict[str, Any]:
    text = (result.folders[0] / "config.json").read_text()
    found: dict[str, Any] = json.loads(text)["quantization_config"]
    return found


@pytest.mark.parametrize("name", ["auto_round", "auto_round:auto_gptq", "llm_compressor", "fake"])
def test_whole_numbers(small: Any, tmp_path: Path, name: str) -> None:
    result = mixed(small(), tmp_path / "out", format=name)
    assert result.report["verified"][name]["kl"] < 1e-3


def test_gptq_names_the_others(small: Any, tmp_path: Path) -> None:
    config = configuration(mixed(small(), tmp_path / "out", format="auto_gptq"))
    assert {rule.get("bits", config["bits"]) for rule in config["dynamic"].values()} | {config["bits"]} == {
        4,
        8,
    }


@pytest.mark.parametrize("name", ["fake", "llm_compressor"])
def test_floating_numbers_with_their_activations(small: Any, tmp_path: Path, name: str) -> None:
    result = mixed(small(), tmp_path / "out", format=name, scheme_options="mxfp4,mxfp8", avg_bits=6)
    for block in range(2):
        parts = [result.plan.scheme_of(f"model.layers.{block}.self_attn.{x}_proj") for x in "qkv"]
        assert parts[0] == parts[1] == parts[2]
    if name == "llm_compressor":
        assert configuration(result)["format"] == "mixed-precision"


@pytest.mark.parametrize("name", ["auto_round", "llm_compressor"])
def test_whole_numbers_beside_rounded_inputs(small: Any, tmp_path: Path, name: str) -> None:
    """A chosen scheme leaves inputs alone also where that of most layers rounds them."""
    result = mixed(small(), tmp_path / "out", format=name, scheme_options="W4A16,MXFP8", avg_bits=7)
    found = {result.plan.scheme_of(layer) for layer in result.plan.quantized}
    assert {(s.data_type, s.act_quantized) for s in found if s} == {("int", False), ("mx_fp", True)}
    assert result.report["verified"][name]["kl"] < 1e-3


def test_gguf_types(tmp_path: Path) -> None:
    model = save_small_model("llama", tmp_path / "model")
    rows = [[t % 60 + 3 for t in row] for row in token_rows(4, 16)]
    result = mixed(
        model, tmp_path / "out", rows, scheme_options="GGUF:Q4_0,GGUF:Q8_0", avg_bits=6.5, format="gguf:q4_0"
    )
    file = next((tmp_path / "out").glob("*.gguf"))
    from gguf import GGUFReader

    found = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors if t.name.startswith("blk.0")}
    assert {found[f"blk.0.attn_{x}.weight"] for x in "qkv"} in ({"Q4_0"}, {"Q8_0"})
    assert {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}["token_embd.weight"] == "Q8_0"
    assert result.report["auto_scheme"]["average_bits"] <= 6.5


def test_experts_of_a_block_share(small: Any, tmp_path: Path) -> None:
    result = mixed(small("qwen3_moe", moe_intermediate_size=32), tmp_path / "out", avg_bits=6)
    experts: dict[str, set[Any]] = {}
    for name in result.plan.quantized:
        block, _, rest = name.partition(".mlp.experts.")
        if rest:
            experts.setdefault(block, set()).add(result.plan.scheme_of(name))
    assert experts
    assert all(len(schemes) == 1 for schemes in experts.values())
    assert result.report["verified"]["auto_round"]["kl"] < 1e-3


def test_language_blocks_of_a_model_that_reads_images(tmp_path: Path) -> None:
    model = save_config(model_config("llava"), tmp_path / "model")
    result = mixed(model, tmp_path / "out", [[t % 60 for t in row] for row in ROWS], avg_bits=6)
    assert all(name.startswith("language_model.") for name in result.plan.quantized)
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6


def test_encoders_get_a_scheme_by_name_or_are_refused_before_work(tmp_path: Path) -> None:
    model = save_config(model_config("llava"), tmp_path / "model")
    rows = [[t % 60 for t in row] for row in ROWS]
    given = {"quant_nontext_module": True, "avg_bits": 7}
    with pytest.raises(UnsupportedError, match=r"12 layers .* such as those of encoders: vision_tower"):
        mixed(model, tmp_path / "out", rows, **given)
    assert not (tmp_path / "cache").exists()
    result = mixed(model, tmp_path / "out", rows, layer_config={"vision_tower": "W8A16"}, **given)
    towers = [name for name in result.plan.quantized if name.startswith("vision_tower")]
    assert len(towers) == 12
    assert {result.plan.scheme_of(name).bits for name in towers} == {8}


def test_several_lists_of_blocks_are_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    monkeypatch.setitem(FLOWS, BLOCK, FLOW)
    monkeypatch.setitem(LISTS, TwoListForCausalLM.__name__, TWO_LISTS)
    tiny_model(TwoListConfig()).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"2 lists of blocks[^)]*--scheme and --layer_config"):
        mixed(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "cache").exists()
