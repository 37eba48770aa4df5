"""The compiled descent: every bit of what PyTorch computes."""

from __future__ import annotations

import pytest
import torch

from auto_round import compiled
from auto_round.numerics import compiled_descent
from auto_round.numerics.descent import cancelling_offsets
from auto_round.numerics.presets import GGUF_FORMATS, int_format
from auto_round.numerics.presets_float import nv_format
from numerics.test_descent import inputs_that_go_together, weight

needs_program = pytest.mark.skipif(compiled_descent._program() is None, reason="no C compiler")

FORMATS = {
    "symmetric": int_format(4, 128, sym=True),
    "zero points": int_format(2, 32, sym=False),
    "floors": GGUF_FORMATS["q4_k"],
    "negative steps": GGUF_FORMATS["q3_k"],
}


@needs_program
@pytest.mark.parametrize("shape", [(1, 256), (24, 512), (131, 256)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_all_bits_are_those_of_pytorch(monkeypatch, name, shape):
    w, importance = weight(*shape, seed=4), inputs_that_go_together(shape[1], seed=5)
    fmt = FORMATS[name].bind(FORMATS[name].stats(w))
    own = cancelling_offsets(fmt, w, None, importance, 3)
    monkeypatch.setattr(compiled_descent, "_program", lambda: None)
    want = cancelling_offsets(fmt, w, None, importance, 3)
    assert own.any()
    assert torch.equal(own.view(torch.int32), want.view(torch.int32))


@needs_program
def test_results_do_not_depend_on_threads(monkeypatch):
    """Nor on a last tile that is filled up."""
    w, importance = weight(67, 160), inputs_that_go_together(160)
    fmt = int_format(4, 32, sym=False)
    want, threads = cancelling_offsets(fmt, w, None, importance, 2), torch.get_num_threads()
    monkeypatch.setattr(compiled, "FEW", 0)
    asked = []
    ask = compiled_descent.compiled_descent
    monkeypatch.setattr(
        "auto_round.numerics.descent.compiled_descent", lambda *a: asked.append(ask(*a)) or asked[-1]
    )
    try:
        torch.set_num_threads(3)
        got = cancelling_offsets(fmt, w, None, importance, 2)
    finally:
        torch.set_num_threads(threads)
    assert asked[0].request.threads == 3
    assert torch.equal(got, want)


def test_other_grids_are_left_to_pytorch():
    parts = [torch.ones(1, 128, 4) for _ in range(5)]
    grid = nv_format().grid
    assert compiled_descent.compiled_descent(grid, *parts[:3], None, *parts[3:]) is None
