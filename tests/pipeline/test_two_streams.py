"""Blocks that hand on two tensors: traced, tuned, continued and verified with one row in a table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from auto_round import AutoRound
from auto_round.calibration.row import CalibrationRow, fingerprint, joined
from auto_round.config import build_options
from auto_round.errors import UnsupportedError
from auto_round.log import ignore_progress
from auto_round.models.families import FLOWS
from auto_round.models.folder import FolderSource
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.quantize import run_job
from auto_round.pipeline.running.trace_rows import trace_rows
from auto_round.testing.tiny_models import tiny_model
from pipeline.runs import ROWS, SHORT, Stop, stop_after, tree
from pipeline.two_streams import BLOCK, FLOW, TwoStreamBlock, TwoStreamConfig, register

CPU = torch.device("cpu")
SIDE_LENGTH = 5


@pytest.fixture
def row(monkeypatch):
    """All that the package has to be told of the family."""
    monkeypatch.setitem(FLOWS, BLOCK, FLOW)


@pytest.fixture
def folder(tmp_path, row):
    register()
    tiny_model(TwoStreamConfig()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def job_for(folder, out, **given):
    """A run whose rows have a third input, and padding in one of them."""
    exact = {"iters": 8, "amp": False}
    options = build_options({**SHORT, **exact, "model": str(folder), "output_dir": str(out), **given})
    job = prepare(options, dataset=ROWS)
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i, row in enumerate(job.rows.rows):
        mask = torch.arange(len(row)) < len(row) - 4 if i == 1 else None
        side = torch.randint(0, 128, (1, SIDE_LENGTH), generator=generator)
        plain = CalibrationRow.of_tokens(row.tokens, mask)
        rows.append(CalibrationRow({**plain.inputs, "side_ids": side}, mask))
    return replace(job, rows=replace(job.rows, rows=tuple(rows), fingerprint=fingerprint(rows)))


def run(job, progress=ignore_progress):
    return run_job(job, progress, Clock())


def test_without_its_row_the_family_is_refused(folder, monkeypatch):
    monkeypatch.delitem(FLOWS, BLOCK)
    with FolderSource.open(folder) as source, pytest.raises(UnsupportedError, match="block by block"):
        source.refuse_untraceable()


def test_blocks_fed_by_the_trace_give_what_the_model_gives(folder, tmp_path):
    job = job_for(folder, tmp_path / "out")
    table, streams = trace_rows(job, tmp_path)
    assert [tuple(s.shape) for s in streams.reference] == [(6, 16, 64), (6, SIDE_LENGTH, 32)]
    pick = [1, 2]
    states = tuple(s[pick] for s in streams.reference)
    model = tiny_model(TwoStreamConfig())
    with torch.no_grad():
        for block in job.source.blocks:
            call, added = table.batch(block.index, pick, CPU)
            assert [a is None for a in added] == [True, block.index == 0]
            states = tuple(s if a is None else s + a for s, a in zip(states, added, strict=True))
            args, kwargs = call.given(states)
            with job.source.block(block.index) as module:
                side, hidden = module(*args, **kwargs)
            states = (hidden, side)
        inputs = joined([job.rows.rows[i] for i in pick])
        wanted = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(model.model.norm(states[0]), wanted)


@pytest.mark.parametrize("given", [{}, {"enable_alg_ext": True, "nblocks": 2}], ids=["blocks", "groups"])
def test_tuned_verified_and_continued(folder, tmp_path, given):
    whole = run(job_for(folder, tmp_path / "whole", **given))
    figures = whole.report["verified"]["auto_round"]
    assert figures["kl"] < 1e-4
    blocks = [entry for entry in whole.report["blocks"] if "loss" in entry]
    assert blocks
    assert all(entry["loss"] > 0 for entry in blocks)
    with pytest.raises(Stop):
        run(job_for(folder, tmp_path / "out", **given), stop_after(1))
    run(job_for(folder, tmp_path / "out", **given))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_one_block_alone(row):
    """Both tensors count in the loss: each comes nearer than by rounding."""
    block = TwoStreamBlock(TwoStreamConfig()).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in block.parameters():
        p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    hidden = torch.randn(16, 8, 64, generator=generator)
    side = torch.randn(16, 3, 32, generator=generator)
    ar = AutoRound("m", scheme="W2A16", group_size=32, seqlen=8, iters=30, lr=0.05, batch_size=4)
    calls = [((hidden[i : i + 4], 1.5), {"side_states": side[i : i + 4]}) for i in range(0, 16, 4)]
    rtn = AutoRound("m", scheme="W2A16", group_size=32, seqlen=8, iters=0, disable_opt_rtn=True)
    start = {name: p.clone() for name, p in block.named_parameters()}
    plain, wanted = rtn.quantize_block(block, calls)
    for name, p in start.items():
        block.get_parameter(name).copy_(p)
    tuned, again = ar.quantize_block(block, calls)
    assert [tuple(t.shape) for t in wanted] == [(16, 8, 64), (16, 3, 32)]
    torch.testing.assert_close(again, wanted)
    side_out, hidden_out = block(hidden, 1.5, side_states=side)
    torch.testing.assert_close(tuned, (hidden_out, side_out))
    for better, worse, exact in zip(tuned, plain, wanted, strict=True):
        assert (better - exact).square().mean() < (worse - exact).square().mean()
