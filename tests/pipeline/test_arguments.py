"""Arguments of several rows: as the model itself would give them for that batch."""

from __future__ import annotations

import pytest
import torch

from auto_round.facts.flow import BlockCall
from auto_round.pipeline.running.block_arguments import ArgumentTable, batch_axes
from auto_round.tuning.samples import Samples
from pipeline.runs import ROWS, kl_of, quantize

CPU = torch.device("cpu")


def calls(batch: int) -> tuple[BlockCall, None]:
    """What one block of an invented model gets for a batch; the model leaves the other one out."""
    alibi = torch.arange(3.0).repeat(batch).reshape(-1, 1, 1)
    rotary = torch.polar(torch.ones(1, 5, 2), torch.arange(10.0).reshape(1, 5, 2))
    second = torch.arange(4.0).reshape(4, 1, 1).repeat(1, batch, 1)
    mask = torch.ones(batch, 5, dtype=torch.int64)
    return BlockCall((alibi, (rotary, [second])), {"mask": mask, "flag": True, "none": None}), None


def test_equal_rows_make_the_batch_that_the_model_makes():
    axes = batch_axes(calls(1), calls(2))
    table = ArgumentTable(axes)
    for _ in range(4):
        table.add(calls(1), ((None,), (None,)))
    got, _ = table.batch(0, range(3), CPU)
    wanted, _ = calls(3)
    assert got is not None
    torch.testing.assert_close(got.args, wanted.args, rtol=0, atol=0)
    torch.testing.assert_close(dict(got.kwargs), dict(wanted.kwargs), rtol=0, atol=0)
    assert got.args[1][0].is_complex()
    assert table.batch(1, range(3), CPU) == (None, (None,))


def test_different_rows_are_joined_where_they_lie():
    table = ArgumentTable(batch_axes(calls(1), calls(2)))
    for row in range(2):
        call, _ = calls(1)
        alibi, (rotary, (second,)) = call.args
        table.add([BlockCall((alibi + row, (rotary * (1 + 1j * row), [second + row])), {})], [(None,)])
    got, _ = table.batch(0, range(2), CPU)
    assert got is not None
    assert got.args[0].flatten().tolist() == [0, 1, 2, 1, 2, 3]
    assert got.args[1][0].shape == (2, 5, 2)
    assert got.args[1][0].imag.abs().max() > 0
    assert got.args[1][1][0].shape == (4, 2, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_masks_of_rows_without_padding(dtype):
    """What is no attention mask says which positions count; causal attention would leave most of them out."""
    table = ArgumentTable()
    counted = torch.tensor([[1, 1, 0, 0]]).to(dtype)
    attention = torch.tensor([[True, False], [True, False]]).reshape(1, 1, 2, 2)
    for masks in ({"counted": None, "mask": None}, {"counted": counted, "mask": attention}):
        table.add([BlockCall((None,), masks)], [(None,)])
    got, _ = table.batch(0, range(2), CPU)
    assert got is not None
    assert got.kwargs["counted"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert got.kwargs["mask"].tolist() == [[[[True, False], [True, True]]], attention[0].tolist()]


@pytest.mark.parametrize("padded", [False, True])
def test_bloom_gets_a_slope_for_every_head_of_every_row(tiny, tmp_path, padded):
    rows = [{"input_ids": r, "attention_mask": [0] * 4 + [1] * 12 if padded else [1] * 16} for r in ROWS]
    result = quantize(tiny("bloom"), tmp_path / "out", dataset=rows)
    assert kl_of(result)["auto_round"] < 1e-6


def test_latent_attention_with_complex_rotary_factors(tiny, tmp_path, recwarn):
    """DeepSeek-V2: values narrower than keys, rotary factors as complex numbers."""
    result = quantize(tiny("deepseek_v2", q_lora_rank=32, kv_lora_rank=32), tmp_path / "out")
    assert any("kv_b_proj" in name for name in result.plan.quantized)
    assert kl_of(result)["auto_round"] < 1e-5
    assert not [w for w in recwarn if "imaginary" in str(w.message)]


def test_rows_that_need_other_arguments_are_of_another_kind():
    def call(mask, tiles):
        return BlockCall(
            (None,), {"attention_mask": mask, "cross_attention_states": torch.zeros(tiles, 3, 4)}
        )

    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    table = ArgumentTable(apart=True)
    for given in (call(mask, 1), call(mask.tril(), 1), call(mask, 2), call(None, 1), None):
        table.add([given], [(None,)])
    kinds = [table.kind(row) for row in range(5)]
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 4
    assert not table.skipped(0)  # some row runs the block
    samples = Samples((torch.zeros(5, 1),), (torch.zeros(5, 1),), kind=table.kind)
    assert [list(index) for index in samples.passes(range(5), 8)] == [[0, 1], [2], [3], [4]]
    assert [list(index) for index in samples.passes([3, 1, 0], 1)] == [[3], [1], [0]]
