"""Several lists of blocks: known by one row in a table, rounded, and refused where they would be run."""

from __future__ import annotations

import pytest

from auto_round.errors import UnsupportedError
from auto_round.models.auto_classes import load_model
from auto_round.models.families import FLOWS, LISTS
from auto_round.models.folder import FolderSource
from auto_round.testing.tiny_models import tiny_model
from pipeline.runs import quantize
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


def test_one_list_is_the_rule(tiny):
    with FolderSource.open(tiny("llama")) as source:
        assert source.block_lists == (source.blocks,)


def test_plain_rounding_reaches_all_lists(folder, tmp_path):
    result = quantize(folder, tmp_path / "out", iters=0, disable_opt_rtn=True, dataset=None)
    assert result.report["verified"]["auto_round"] == {"tokens": 1}
    assert {name.rpartition(".")[0] for name in result.plan.quantized} >= {"model.tail.0", "model.tail.1"}
    model = load_model(result.folders[0], trust_remote_code=False)
    assert type(model.model.tail[0].proj).__name__ == type(model.model.layers[0].up).__name__ != "Linear"


def test_running_them_one_after_another_is_refused(folder, tmp_path):
    with pytest.raises(UnsupportedError, match="2 lists of blocks") as caught:
        quantize(folder, tmp_path / "out")
    assert "plain rounding" in str(caught.value)
