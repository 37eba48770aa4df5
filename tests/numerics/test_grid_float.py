"""Floating grids against PyTorch's own float8 and the number types of ml_dtypes, code by code."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.errors import InternalError
from auto_round.numerics.grid_float import E4M3, E5M2, FLOAT_GRIDS, FloatGrid
from auto_round.testing.grid_kit import every_code, ladder

THEIRS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
EACH = pytest.mark.parametrize("name", FLOAT_GRIDS)


def every_bfloat16() -> torch.Tensor:
    """All finite numbers of bfloat16, as float32."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    x = (bits << 16).view(torch.float32)
    return x[x.isfinite()]


def valid(grid: FloatGrid) -> torch.Tensor:
    codes = every_code(grid)
    return codes[grid.decode(codes).abs() <= grid.hi]


@EACH
def test_every_code_is_the_number_that_ml_dtypes_says(name):
    grid = FLOAT_GRIDS[name]
    codes = valid(grid)
    theirs = codes.numpy().view(np.uint8).astype(np.uint8).view(THEIRS[name]).astype(np.float32)
    ours = grid.decode(codes)
    assert torch.equal(ours, torch.from_numpy(theirs))
    assert torch.equal(torch.signbit(ours), torch.from_numpy(np.signbit(theirs)))
    assert torch.equal(grid.encode(ours), codes)
    assert float(ours.max()) == grid.hi == float(ml_dtypes.finfo(THEIRS[name]).max)
    assert grid.smallest_normal == float(ml_dtypes.finfo(THEIRS[name]).smallest_normal)


@EACH
def test_every_bfloat16_is_rounded_as_ml_dtypes_does(name):
    grid = FLOAT_GRIDS[name]
    x = every_bfloat16()
    x = x[x.abs() <= grid.hi]  # beyond the ends, we saturate
    theirs = torch.from_numpy(x.numpy().astype(THEIRS[name]).astype(np.float32))
    assert torch.equal(grid.snap(x), theirs)
    assert torch.equal(torch.signbit(grid.snap(x)), torch.signbit(theirs))


@pytest.mark.parametrize("name", TORCH)
def test_every_bfloat16_has_the_code_of_torch(name):
    grid = FLOAT_GRIDS[name]
    x = every_bfloat16().clamp(grid.lo, grid.hi)
    assert torch.equal(grid.encode(grid.snap(x)), x.to(TORCH[name]).view(torch.uint8))


@EACH
def test_what_lies_beyond_the_ends_saturates(name):
    grid = FLOAT_GRIDS[name]
    x = every_bfloat16()
    beyond = x[x.abs() > grid.hi]
    assert torch.equal(grid.snap(beyond), beyond.sign() * grid.hi)


@EACH
def test_midpoints_go_to_the_even_code_and_all_else_to_the_nearest(name):
    grid = FLOAT_GRIDS[name]
    rungs = ladder(grid)
    rungs = rungs[rungs.abs() <= grid.hi]
    middle = (rungs[:-1] + rungs[1:]) / 2
    assert torch.equal(grid.snap(torch.nextafter(middle, rungs[:-1])), rungs[:-1])
    assert torch.equal(grid.snap(torch.nextafter(middle, rungs[1:])), rungs[1:])
    assert not (grid.encode(grid.snap(middle)) & 1).any()


@EACH
def test_spacing_is_the_distance_to_the_next_number(name):
    grid = FLOAT_GRIDS[name]
    rungs = ladder(grid)
    rungs = rungs[(rungs >= 0) & (rungs <= grid.hi)]
    assert torch.equal(grid.spacing(rungs[:-1]), rungs.diff())
    assert torch.equal(grid.spacing(-rungs), grid.spacing(rungs))
    assert torch.equal(grid.spacing(torch.tensor([2 * grid.hi, torch.inf])), rungs.diff()[-1].expand(2))


@EACH
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_no_number_of_the_grid_is_nearer(name, x):
    grid = FLOAT_GRIDS[name]
    u = torch.tensor([x])
    numbers = grid.decode(valid(grid)).double()
    assert float((grid.snap(u).double() - u.double()).abs()) == float((numbers - x).abs().min())


def test_results_may_be_put_where_they_are_wanted():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    room, codes = torch.empty_like(x), torch.empty(7, 5, dtype=torch.uint8)
    assert E4M3.snap(x, out=room) is room
    assert torch.equal(room, E4M3.snap(x))
    assert E4M3.encode(room, out=codes) is codes
    assert torch.equal(codes, E4M3.encode(room))
    assert torch.equal(E4M3.snap(x, out=x), room)


def test_a_zero_point_is_refused():
    with pytest.raises(InternalError, match="zero point"):
        E5M2.snap(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("wrong", [FloatGrid(4, 3, 240.0), FloatGrid(3, 3, 448.0), FloatGrid(4, 2, 448.0)])
def test_another_grid_would_be_seen(wrong):
    x = every_bfloat16().clamp(-448, 448)
    assert not torch.equal(wrong.snap(x), x.to(torch.float8_e4m3fn).float())
