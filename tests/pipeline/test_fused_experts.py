"""Experts that a plain folder has in one tensor: tuned, written one by one, loaded again by Transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import UnsupportedError
from auto_round.facts.layer import Layer, Role
from auto_round.models.folder import FolderSource
from auto_round.pipeline.converting.convert import convert_folder
from auto_round.pipeline.converting.source import open_stored
from auto_round.pipeline.deciding.one_parameter import refuse_torn_tensors
from pipeline.runs import quantize

FAMILIES = {
    "gpt_oss": "model.layers.0.mlp.experts.1.up_proj",
    "granitemoe": "model.layers.0.block_sparse_moe.experts.1.up_proj",
    "llama4_text": "model.layers.1.feed_forward.experts.1.up_proj",
    "aria_text": "model.layers.0.mlp.experts.1.up_proj",
}
"""Family -> the name of one of its matrices, as engines have it."""
PLAIN = {"iters": 0, "disable_opt_rtn": True}
_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(FAMILIES)[1:]]


@pytest.mark.parametrize("family", [next(iter(FAMILIES)), *_SLOW])
def test_tuned_and_loaded_again(saved_family, tmp_path, family):
    # In float32: a run and the reloaded folder give an expert other numbers of tokens at a time, so sums
    # may be added in another order; in bfloat16 that alone is 6e-6 on processors without AVX-512.
    result = quantize(saved_family(family), tmp_path / "out", iters=1, amp=False)
    assert result.report["verified"]["auto_round"]["kl"] < 1e-10
    assert FAMILIES[family] in result.plan.quantized
    with Checkpoint.open(tmp_path / "out") as files:
        assert f"{FAMILIES[family]}.qweight" in files
        assert not [name for name in files.names if name.endswith(("experts.gate_up_proj", "fc1.weight"))]
    with pytest.raises(UnsupportedError, match="holds experts one by one"):
        FolderSource.open(tmp_path / "out")


def test_kept_experts_stay_one_tensor(saved_family, tmp_path):
    result = quantize(saved_family("gpt_oss"), tmp_path / "out", iters=1, ignore_layers="experts")
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6
    with Checkpoint.open(tmp_path / "out") as files:
        assert "model.layers.0.mlp.experts.gate_up_proj" in files


@pytest.mark.parametrize("form", ["auto_gptq", pytest.param("auto_awq", marks=pytest.mark.slow)])
def test_folders_of_other_tools_hold_them_one_by_one(saved_family, tmp_path, form):
    result = quantize(saved_family("granitemoe"), tmp_path / "out", format=form, **PLAIN, nsamples=2)
    assert FAMILIES["granitemoe"] in result.plan.quantized
    assert result.report["verified"][form]["kl"] < 1e-6
    with Checkpoint.open(tmp_path / "out") as files:
        assert f"{FAMILIES['granitemoe']}.qweight" in files


def test_compressed_tensors_are_for_vllm_and_say_so(saved_family, tmp_path, caplog):
    result = quantize(
        saved_family("granitemoe"), tmp_path / "out", format="llm_compressor", **PLAIN, dataset=None
    )
    assert "one tensor of all experts here, unlike vLLM" in caplog.text
    assert "skipped" in result.report["verified"]["llm_compressor"]
    with Checkpoint.open(tmp_path / "out") as files:
        assert f"{FAMILIES['granitemoe']}.weight_packed" in files


@pytest.mark.parametrize("form", ["auto_gptq", "auto_awq", "llm_compressor"])
def test_what_no_engine_reads_is_refused_before_work(saved_family, tmp_path, form):
    with pytest.raises(UnsupportedError, match=r"formats that can: auto_round(.|\n)*none in this format"):
        quantize(saved_family("gpt_oss"), tmp_path / "out", format=form, **PLAIN)
    assert not list(tmp_path.iterdir())


def test_conversions_follow_the_same_rules(saved_family, tmp_path):
    for family in ("granitemoe", "gpt_oss"):
        quantize(saved_family(family), tmp_path / family, verify=False, dataset=None, **PLAIN)
    made = convert_folder(tmp_path / "granitemoe", "llm_compressor", tmp_path / "out")
    assert "unlike vLLM" in made.verified["skipped"]
    with pytest.raises(UnsupportedError, match="none in this format"):
        convert_folder(tmp_path / "gpt_oss", "auto_gptq", tmp_path / "other")


def test_what_no_engine_reads_is_written_where_it_is_kept(saved_family, tmp_path):
    kept = {"ignore_layers": "experts", "dataset": None, **PLAIN}
    result = quantize(saved_family("gpt_oss"), tmp_path / "out", format="auto_gptq", **kept)
    assert FAMILIES["gpt_oss"] not in result.plan.quantized


@pytest.mark.parametrize(
    "given", [{"iters": 1}, {"iters": 0, "disable_opt_rtn": True}], ids=["tuned", "plain"]
)
def test_some_of_them_are_refused_before_work(saved_family, tmp_path, given):
    one = {"model.layers.0.mlp.experts.2.up_proj": {"bits": 16}}
    with pytest.raises(UnsupportedError, match=r"holds 8 matrices, of which the plan keeps .*2\.up_proj"):
        quantize(saved_family("gpt_oss"), tmp_path / "out", layer_config=one, **given)
    assert not list(tmp_path.iterdir())


def test_groups_of_several_rows_are_refused_where_rows_stand_in_turn():
    rows = ((0, 64, 2), (1, 64, 2))
    layers = [
        Layer(f"e.0.{n}", "e.both", "e.both", (32, 64), torch.bfloat16, 0, Role.EXPERT, 0, each, fused=True)
        for n, each in zip(("gate", "up"), rows, strict=True)
    ]
    blocks = SimpleNamespace(group=SimpleNamespace(rows=2))
    with pytest.raises(UnsupportedError, match=r"stand in turn in e\.both"):
        refuse_torn_tensors(SimpleNamespace(format_of=lambda name: blocks), layers)


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("granitemoe", marks=pytest.mark.slow)])
def test_dequantized_ones_are_one_tensor_again(saved_family, tmp_path, family):
    """Rows in turn and `[in, out]` (gpt-oss) or `[out, in]`: what was rounded lies where it came from."""
    result = quantize(saved_family(family), tmp_path / "out", format="fake,auto_round", nsamples=2, **PLAIN)
    assert result.report["verified"]["fake"]["kl"] < 1e-6
    kept = {layer.name: layer for layer in FolderSource.open(saved_family(family)).layers if layer.fused}
    assert kept.keys() <= set(result.plan.quantized)
    fake, packed = result.folders
    with Checkpoint.open(saved_family(family)) as old, Checkpoint.open(fake) as new:
        assert list(new.names) == list(old.names)
        name = next(iter(kept.values())).tensor
        assert new.info(name).shape == old.info(name).shape
        assert not torch.equal(new.read(name), old.read(name))
    with FolderSource.open(fake) as source, Checkpoint.open(packed) as files:
        stored = open_stored(packed, files)
        for entry in stored.layers:
            if entry.name in kept:
                q = stored.packed[entry.name].read(files).weight
                torch.testing.assert_close(
                    source.read(kept[entry.name]), q.format.dequantize(q, torch.float32)
                )


@pytest.mark.slow
def test_a_tuned_one_is_what_it_was_tuned_to(saved_family, tmp_path):
    result = quantize(saved_family("gpt_oss"), tmp_path / "out", format="fake", iters=1)
    assert result.report["verified"]["fake"]["kl"] < 1e-6
