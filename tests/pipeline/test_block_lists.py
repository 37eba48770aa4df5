"""Several lists of blocks: known by one row in a table, rounded, tuned one after another."""

from __future__ import annotations

import pytest
import torch

from auto_round.config import build_options
from auto_round.errors import UnsupportedError
from auto_round.models.auto_classes import load_model
from auto_round.models.families import FLOWS, LISTS
from auto_round.models.folder import FolderSource
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.running.trace_rows import trace_rows
from auto_round.testing.tiny_models import tiny_model
from pipeline.runs import ROWS, SHORT, Stop, kl_of, quantize, stop_after, tree
from pipeline.two_streams import BLOCK, FLOW, TWO_LISTS, TwoListConfig, TwoListForCausalLM, register


@pytest.fixture
def folder(tmp_path, monkeypatch):
    register()
    monkeypatch.setitem(FLOWS, BLOCK, FLOW)
    monkeypatch.setitem(LISTS, TwoListForCausalLM.__name__, TWO_LISTS)
    tiny_model(TwoListConfig()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_blocks_know_their_list(folder):
    with FolderSource.open(folder) as source:
        assert [len(blocks) for blocks in source.block_lists] == [3, 2]
        assert [block.index for blocks in source.block_lists for block in blocks] == [0, 1, 2, 3, 4]
        assert [block.in_list for block in source.blocks] == [0, 0, 0, 1, 1]
        assert source.blocks[3].disk == "model.tail.0"
        assert {layer.block for layer in source.layers} == {0, 1, 2, 3, 4, None}


def test_all_blocks_together_are_those_of_one_list(folder, tmp_path):
    with pytest.raises(UnsupportedError, match="it has 2 lists of blocks"):
        quantize(folder, tmp_path / "out", distill_steps=1, distill_nsamples=2)


def test_one_list_is_the_rule(tiny):
    with FolderSource.open(tiny("llama")) as source:
        assert source.block_lists == (source.blocks,)


def test_plain_rounding_reaches_all_lists(folder, tmp_path):
    result = quantize(folder, tmp_path / "out", iters=0, disable_opt_rtn=True, dataset=None)
    assert result.report["verified"]["auto_round"] == {"tokens": 1}
    assert {name.rpartition(".")[0] for name in result.plan.quantized} >= {"model.tail.0", "model.tail.1"}
    model = load_model(result.folders[0], trust_remote_code=False)
    assert type(model.model.tail[0].proj).__name__ == type(model.model.layers[0].up).__name__ != "Linear"


@pytest.fixture
def given():
    """Rows of which one is padded, and arithmetic in float32."""
    masks = [[0] * 4 + [1] * 12 if i == 1 else [1] * 16 for i in range(len(ROWS))]
    rows = [{"input_ids": r, "attention_mask": m} for r, m in zip(ROWS, masks, strict=True)]
    return {"amp": False, "dataset": rows}


def test_what_flows_into_the_second_list_is_found_behind_the_first(folder, tmp_path, given):
    """A norm stands between the lists: the second begins with what the model makes of the first one's end."""
    options = build_options(
        {**SHORT, "model": str(folder), "output_dir": str(tmp_path / "out"), "amp": False}
    )
    job = prepare(options, dataset=given["dataset"])
    _, first = trace_rows(job, tmp_path)
    generator = torch.Generator().manual_seed(0)
    ends = [torch.randn(s.shape, generator=generator) for s in first.reference]
    for i in range(first.rows):
        first.restart(i, tuple(end[i : i + 1] for end in ends))
    _, second = trace_rows(job, tmp_path, None, [first])
    norm = tiny_model(TwoListConfig()).model.norm
    with torch.no_grad():
        torch.testing.assert_close(second.quantized, (norm(ends[0]),))
        torch.testing.assert_close(second.reference, (norm(first.reference[0]),))


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_tuned_verified_and_continued(folder, tmp_path, given, stop):
    whole = quantize(folder, tmp_path / "whole", **given)
    assert kl_of(whole)["auto_round"] < 1e-4
    units = [entry["unit"] for entry in whole.report["blocks"] if "loss" in entry]
    assert units == [*(f"model.layers.{i}" for i in range(3)), "model.tail.0", "model.tail.1"]
    with pytest.raises(Stop):
        quantize(folder, tmp_path / "out", progress=stop_after(stop), **given)
    seen = []
    quantize(folder, tmp_path / "out", progress=seen.append, **given)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sum(event.stage == "tune" for event in seen) == len(units) - stop


def test_groups_do_not_cross_from_list_to_list(folder, tmp_path, given):
    result = quantize(folder, tmp_path / "out", nblocks=2, **given)
    units = [entry["unit"] for entry in result.report["blocks"] if "loss" in entry]
    assert units == ["model.layers.0 to model.layers.1", "model.layers.2", "model.tail.0 to model.tail.1"]
