"""Every 16-bit number through every grid, and every rule of powers of two at every power of two."""

from __future__ import annotations

import math

import pytest
import torch

from auto_round.errors import NumericsError
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.grid_float import E5M3, FLOAT_GRIDS
from auto_round.numerics.presets import INT_BITS
from auto_round.numerics.presets_float import mx_format
from auto_round.numerics.scale import Stats
from auto_round.numerics.scale_power import LEAST, PowerOfTwo, ceil_rule, floor_rule
from auto_round.testing.grid_kit import every_code

WHOLE = {f"int{bits}_{lo}": IntGrid(bits, lo) for bits in INT_BITS for lo in (0, -(1 << (bits - 1)))}
GRIDS = {**FLOAT_GRIDS, **WHOLE}
PATTERNS = torch.arange(1 << 16, dtype=torch.int32)
BFLOAT16 = (PATTERNS << 16).view(torch.float32)
HALF = PATTERNS.to(torch.int16).view(torch.float16).float()


@pytest.mark.parametrize("inputs", [BFLOAT16, HALF], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_number_goes_to_the_nearest_and_ties_to_the_even_code(name, inputs):
    """Found by comparing with all numbers of the grid; infinities go to the ends."""
    grid = GRIDS[name]
    x = inputs[~inputs.isnan()]
    numbers, codes = _ladder(grid)
    inside = x.clamp(grid.lo, grid.hi).double()
    above = torch.searchsorted(numbers, inside).clamp_(1, len(numbers) - 1)
    down, up = inside - numbers[above - 1], numbers[above] - inside
    even = codes[above] % 2 == 0
    wanted = torch.where((up < down) | ((up == down) & even), numbers[above], numbers[above - 1])
    assert torch.equal(grid.snap(x).double(), wanted)
    assert torch.equal(grid.decode(grid.encode(grid.snap(x))), grid.snap(x))


@pytest.mark.parametrize("inputs", [BFLOAT16, HALF], ids=["bfloat16", "float16"])
def test_every_number_goes_to_the_nearest_of_the_wider_scales(inputs):
    """E5M3 without its sign; numbers below half the least one become 0, which no group is given."""
    x = inputs[inputs >= 0]
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = E5M3.decode(codes).double()
    codes, numbers = codes[numbers <= E5M3.hi], numbers[numbers <= E5M3.hi]
    inside = x.clamp(max=E5M3.hi).double()
    above = torch.searchsorted(numbers, inside).clamp_(1, len(numbers) - 1)
    down, up = inside - numbers[above - 1], numbers[above] - inside
    wanted = torch.where((up < down) | ((up == down) & (codes[above] % 2 == 0)), above, above - 1)
    assert torch.equal(E5M3.encode(E5M3.snap(x)), codes[wanted])


def _ladder(grid):
    """Numbers of a grid, ascending, float64, and a code of each."""
    codes = every_code(grid)
    numbers, order = grid.decode(codes).double().sort()
    first = torch.cat([torch.tensor([True]), numbers.diff() > 0])
    return numbers[first], codes[order][first]


@pytest.mark.parametrize("bits", INT_BITS)
def test_every_code_of_whole_numbers(bits):
    codes = torch.arange(1 << bits).to(torch.uint8)
    for lo in (0, -(1 << (bits - 1))):
        grid = IntGrid(bits, lo)
        assert grid.decode(codes).tolist() == list(range(lo, lo + (1 << bits)))
        assert torch.equal(grid.encode(grid.decode(codes)), codes)


def test_every_code_of_the_wider_scales():
    """E5M3 is used without a sign: 256 codes, `(8 + m) * 2**(e - 18)` or `m * 2**-17` for `e = 0`."""
    codes = torch.arange(256).to(torch.uint8)
    wanted = [math.ldexp(c % 8 + 8 * (c >= 8), max(c // 8, 1) - 18) for c in range(256)]
    found = E5M3.decode(codes)
    assert found.tolist() == wanted
    inside = found <= E5M3.hi
    assert torch.equal(E5M3.encode(found)[inside], codes[inside])


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8_e4m3_row"])
def test_patterns_that_are_no_number_are_counted(name):
    from auto_round.numerics.presets_float import FLOAT_FORMATS

    w = PATTERNS.to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    bad = int((~w.isfinite()).sum())
    assert bad == 256
    with pytest.raises(NumericsError, match="256 of 65536"):
        FLOAT_FORMATS[name].quantize(w)


ELEMENTS = ("fp4", "fp6", "fp8", "fp6_e3m2", "fp8_e5m2")
POWERS = list(range(-120, 120))


@pytest.mark.parametrize("side", ["at", "below", "above"])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("name", ["floor", "ceil", "rceil"])
def test_published_rules_at_every_power_of_two(name, element, side):
    """With `m` the largest extreme and `top` the largest number:

    floor: `floor(log2 m) - floor(log2 top)`; ceil: `ceil(log2 m) - floor(log2 top)`;
    rceil: `ceil(log2(m / top))`. All are `PowerOfTwo` with one number each.
    """
    grid = mx_format(element).grid
    whole = math.floor(math.log2(grid.hi))
    rule, wanted = {
        "floor": (floor_rule(grid), lambda x: math.frexp(x)[1] - 1 - whole),
        "ceil": (PowerOfTwo(2.0**whole), lambda x: least(x, 1.0) - whole),
        "rceil": (ceil_rule(grid), lambda x: least(x, grid.hi)),
    }[name]
    size = torch.ldexp(torch.ones(len(POWERS)), torch.tensor(POWERS))
    if side != "at":
        size = torch.nextafter(size, size * (2.0 if side == "above" else 0.5))
    found = rule.fit(Stats(torch.zeros_like(size), size), grid).parts["exponent"].int() - 127
    assert found.tolist() == [max(LEAST, wanted(x)) for x in size.tolist()]


def least(x, top):
    """Least whole `e` with `x <= top * 2**e`, exactly."""
    (head, power), (other, its) = math.frexp(x), math.frexp(top)
    return power - its + (head > other)


@pytest.mark.parametrize("element", ELEMENTS)
def test_powers_at_the_largest_number(element):
    """`rceil` takes the largest number times a power of two as it is, and the next power for a bit more."""
    grid = mx_format(element).grid
    exponents = torch.arange(-100, 100)
    size = torch.ldexp(torch.full((len(exponents),), grid.hi), exponents)
    more = torch.nextafter(size, size * 2)
    for x, wanted in ((size, exponents), (more, exponents + 1)):
        found = ceil_rule(grid).fit(Stats(torch.zeros_like(x), x), grid).parts["exponent"].int() - 127
        assert torch.equal(found, wanted.int())
