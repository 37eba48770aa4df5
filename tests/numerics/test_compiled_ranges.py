"""Ranges of groups by the C program are PyTorch's."""

from __future__ import annotations

import pytest
import torch

from auto_round.compiled import numeric_library
from auto_round.errors import NumericsError
from auto_round.numerics import format
from auto_round.numerics.compiled_ranges import SOURCE, compiled_ranges
from auto_round.numerics.group import Group
from auto_round.numerics.presets import int_format

needs_program = pytest.mark.skipif(numeric_library(SOURCE, (), "") is None, reason="no C compiler")
DTYPES = [torch.bfloat16, torch.float32]


def weights(shape, dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = w.view(-1)
    flat[::5] = flat[::5].abs()  # groups of one sign, and zeros of both
    flat[1::7], flat[2::11] = 0.0, -0.0
    w[..., 0, :], w[..., 1, :], w[..., 2, :] = 0.0, w[..., 1, :].abs(), -w[..., 2, :].abs()
    return w.to(dtype)


@needs_program
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [128, 32, 20, 7, 1, -1])
@pytest.mark.parametrize("shape", [(5, 384), (3, 40), (4, 6, 256), (300, 256)])
def test_ranges_are_those_of_pytorch(shape, size, dtype, monkeypatch):
    fmt, w = int_format(4, size, sym=True), weights(shape, dtype)
    asked = []
    monkeypatch.setattr(
        format, "compiled_ranges", lambda *given: asked.append(compiled_ranges(*given)) or asked[-1]
    )
    found = fmt.stats(w)
    assert asked[0] is not None
    monkeypatch.setattr(format, "compiled_ranges", lambda *_: None)
    expected = fmt.stats(w)
    assert torch.equal(found.lo, expected.lo)
    assert torch.equal(found.hi, expected.hi)
    assert found.lo.dtype is torch.float32


@needs_program
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad, dtype):
    w = weights((8, 256), dtype)
    w[5, 130] = bad
    with pytest.raises(NumericsError, match="1 of 2048 weights are NaN or infinite"):
        int_format(4, 128, sym=True).stats(w)


@pytest.mark.parametrize(
    ("group", "w"),
    [
        (Group(0), torch.zeros(4, 32)),
        (Group(32, 4), torch.zeros(4, 32)),
        (Group(32), torch.zeros(4, 32, dtype=torch.float16)),
        (Group(32), torch.zeros(4, 64)[:, ::2]),
        (Group(32), torch.zeros(4, 32, device="meta")),
        (Group(32), torch.zeros(0, 32)),
    ],
)
def test_what_the_program_does_not_do_is_left_to_pytorch(group, w):
    assert compiled_ranges(group, w) is None
