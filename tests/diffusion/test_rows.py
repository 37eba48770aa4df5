"""Calls of a component cut into rows, kept on disk, and put together again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from auto_round.diffusion.record import PipelineRecorder, joined, kept_steps, one_row
from auto_round.diffusion.rows import RecordedRows, RowWriter
from auto_round.errors import UnsupportedError


def a_call(batch):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 4, 3, generator=generator),
        "timestep": torch.full((batch,), 7.0),
        "pooled": torch.randn(batch, 3, generator=generator).expand(batch, 3),
        "x": [torch.randn(2 + i, 3, generator=generator) for i in range(batch)],
        "shapes": [[(1, 2, 2)] for _ in range(batch)],
        "added": {"ids": torch.arange(batch * 2).reshape(batch, 2), "none": None},
        "scale": 1.5,
        "pair": (1, 2),
        "flag": True,
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return one == other


def test_cut_and_joined_again():
    call = a_call(3)
    rows = [{name: one_row(value, i, 3) for name, value in call.items()} for i in range(3)]
    assert rows[1]["hidden_states"].shape == (1, 4, 3)
    assert len(rows[2]["x"]) == 1
    assert same(joined(rows), call)


def test_rows_on_disk(tmp_path):
    writer = RowWriter(tmp_path)
    call = a_call(2)
    rows = [{name: one_row(value, i, 2) for name, value in call.items()} for i in range(2)]
    for i, row in enumerate(rows):
        writer.add(i, 5, 7.0, row)
    assert RecordedRows.open(tmp_path) is None  # not finished
    writer.finish()
    found = RecordedRows.open(tmp_path)
    assert [(entry.caption, entry.step) for entry in found.entries] == [(0, 5), (1, 5)]
    assert all(same(found.read(i), row) for i, row in enumerate(rows))
    turned = found.arranged([1, 0])
    assert same(turned.read(0), rows[1])
    assert turned.fingerprint != found.fingerprint
    assert RecordedRows.open(tmp_path).fingerprint == found.fingerprint


@pytest.mark.parametrize(("total", "kept"), [(28, 4), (50, 4), (3, 2), (10, 1), (4, 4), (4, 9), (20, 0)])
def test_kept_steps_cover_all_steps(total, kept):
    each = [kept_steps(caption, total, kept) for caption in range(4 * total)]
    wanted = min(kept or total, total)
    assert all(len(steps) == wanted and steps <= set(range(total)) for steps in each)
    counts = [sum(step in steps for steps in each) for step in range(total)]
    mean = len(each) * wanted / total
    assert all(0.5 * mean <= count <= 1.6 * mean for count in counts), counts
    for steps in map(sorted, each):  # evenly apart
        gaps = [after - before for before, after in pairwise(steps)]
        assert all(abs(gap - total / wanted) < 1 for gap in gaps)


class Encoder(torch.nn.Module):
    def forward(self, ids, mask=None, **kwargs):
        raise NotImplementedError


def test_an_encoder_is_kept_whatever_the_step(tmp_path):
    """It is told no time; its calls count no step, and what it reads twice is kept once."""
    encoder, writer, recorder = (
        Encoder(),
        RowWriter(tmp_path),
        PipelineRecorder(first=6, count=2, total=9, kept=1),
    )
    ids = torch.tensor([[1, 2], [1, 3]])
    recorder.note(encoder, (ids,), {"mask": ids > 1, "scale": 2, "output_hidden_states": True}, writer=writer)
    recorder.note(encoder, (ids[[1, 1]],), {"mask": ids[[1, 1]] > 1, "scale": 2}, writer=writer)
    with pytest.raises(UnsupportedError, match="3 pictures for 2 captions"):
        recorder.note(encoder, (torch.zeros(3, 2),), {}, writer=writer)
    writer.finish()
    rows = RecordedRows.open(tmp_path)
    assert [(entry.caption, entry.step) for entry in rows.entries] == [(6, 0), (7, 0)]
    assert same(rows.read(1), {"ids": ids[1:], "mask": ids[1:] > 1, "scale": 2})
    assert recorder._step == -1
