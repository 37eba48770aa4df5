"""E8M0 steps: every byte, and every rule at every power of two."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from auto_round.numerics.grid_float import E2M1, E2M3, E3M2, E4M3, E5M2
from auto_round.numerics.presets_float import mx_format
from auto_round.numerics.scale import Knobs, Stats
from auto_round.numerics.scale_power import PowerOfTwo, below_rule, ceil_rule, floor_rule

GRIDS = {
    "e2m1": (E2M1, 8.0),
    "e2m3": (E2M3, 8.0),
    "e3m2": (E3M2, 32.0),
    "e4m3": (E4M3, 480.0),
    "e5m2": (E5M2, 65536.0),
}
EACH = pytest.mark.parametrize("name", GRIDS)


def stats_of(size: torch.Tensor) -> Stats:
    return Stats(torch.zeros_like(size), size)


def around_powers() -> torch.Tensor:
    """Float32 numbers at, just below and just above every power of two, its halves and three quarters."""
    powers = torch.ldexp(torch.ones(240), torch.arange(-118, 122))
    x = torch.cat([powers * f for f in (1.0, 1.5, 1.75, 1.875, 1.9375)])
    return torch.cat([x, torch.nextafter(x, x * 2), torch.nextafter(x, x / 2)])


def exponent(rule: PowerOfTwo, x: torch.Tensor, grid) -> list[int]:
    return (rule.fit(stats_of(x), grid).parts["exponent"].int() - 127).tolist()


def test_every_byte_is_what_ml_dtypes_says():
    octets = torch.arange(256).to(torch.uint8)
    theirs = torch.from_numpy(octets.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    ours = PowerOfTwo(6.0).read({"exponent": octets}).step
    assert torch.equal(ours[:255], theirs[:255])
    assert ours[255].isnan()
    assert theirs[255].isnan()


@EACH
def test_floor(name):
    grid, _ = GRIDS[name]
    x = around_powers()
    shift = math.floor(math.log2(grid.hi))
    want = [max(-126, math.frexp(v)[1] - 1 - shift) for v in x.tolist()]
    assert exponent(floor_rule(grid), x, grid) == want


@EACH
def test_ceil(name):
    grid, _ = GRIDS[name]
    x = around_powers()
    found = exponent(ceil_rule(grid), x, grid)
    for v, e in zip(x.tolist(), found, strict=True):
        assert v <= grid.hi * 2.0**e
        assert e == -126 or v > grid.hi * 2.0 ** (e - 1)


@EACH
def test_nearest_saturates_only_what_rounds_to_the_largest_number(name):
    grid, beyond = GRIDS[name]
    x = around_powers()
    for v, e in zip(x.tolist(), exponent(below_rule((grid.hi + beyond) / 2), x, grid), strict=True):
        assert v / 2.0**e < (grid.hi + beyond) / 2
        assert e == -126 or v / 2.0 ** (e - 1) >= (grid.hi + beyond) / 2


def test_a_group_of_zeros_has_a_step():
    scale = floor_rule(E2M1).fit(stats_of(torch.zeros(3)), E2M1)
    assert (scale.step > 0).all()
    assert scale.step.isfinite().all()


@EACH
def test_multipliers_move_the_exponent_and_gradients_follow_the_extreme(name):
    grid, _ = GRIDS[name]
    size = torch.tensor([5.0, 6.5, 0.3])
    knobs = Knobs(torch.ones(3), torch.full((3,), 0.5, requires_grad=True))
    rule = floor_rule(grid)
    step = rule.fit(stats_of(size), grid, knobs).step
    assert torch.equal(step, rule.fit(stats_of(size), grid).step / 2)
    step.sum().backward()
    assert torch.allclose(knobs.hi.grad, step.detach() / knobs.hi.detach())


def test_fractions_of_whole_numbers():
    rule = floor_rule(E2M1, fraction=2)
    scale = rule.fit(stats_of(torch.tensor([6.0])), E2M1)
    assert torch.equal(rule.read(scale.parts).step, scale.step)
    assert int(scale.parts["exponent"]) == int(math.log2(float(scale.step))) + 127 + 2


@pytest.mark.parametrize(("bits", "element"), [(4, "fp4"), (6, "fp6"), (8, "fp8")])
def test_compressed_tensors_chooses_the_same_powers(bits, element):
    utils = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    x = around_powers()
    x = torch.cat([x, x * 1.0625, x * 1.3]).bfloat16().float()
    x = x[(x > 1e-30) & (x < 1e30)]
    fmt = mx_format(element)
    ours = fmt.rule.fit(stats_of(x), fmt.grid).parts["exponent"].float()
    assert torch.equal(ours, utils.generate_mx_scales(x.bfloat16(), bits).float())
