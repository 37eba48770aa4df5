"""Every row of the table passes the kit at birth, so does any other whole-number format; mutants do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from auto_round.errors import ConfigError
from auto_round.layouts.table import LAYOUTS
from auto_round.numerics.format import Format
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.group import Group
from auto_round.numerics.presets import FORMATS, GGUF_FORMATS, int_format
from auto_round.numerics.scale import Scale
from auto_round.numerics.scale_integer import MinMax, SignedMax
from auto_round.numerics.search import THOROUGH
from auto_round.schemes.scheme import parse_scheme
from auto_round.testing.failure import ConformanceError
from auto_round.testing.format_kit import check_format
from auto_round.testing.layout_kit import check_layout
from auto_round.tuning.weights import round_to_nearest

SYM, ASYM = int_format(4, 32, sym=True), int_format(4, 32, sym=False)


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_of_the_table_passes_the_kit(name):
    check_format(FORMATS[name])


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([-1, 0, 1, 3, 16, 48, 100]),
    sym=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
@example(bits=8, group=1, sym=False, dtype=torch.bfloat16, seed=0)  # the step of one weight is not known
@settings(max_examples=12, deadline=None)
def test_any_whole_number_format_passes_the_kit(bits, group, sym, dtype, seed):
    check_format(int_format(bits, group, sym=sym, scale_dtype=dtype), seed=seed)


@pytest.mark.parametrize("sym", [True, False])
def test_a_made_up_format_is_one_row(sym):
    """A width and group size that no row has: kit, scheme, rounding, search and layouts take it as it is."""
    made_up = int_format(5, 48, sym=sym)
    table = {**FORMATS, made_up.name: made_up}
    assert len(table) == len(FORMATS) + 1
    check_format(made_up)
    assert parse_scheme({"bits": 5, "group_size": 48, "sym": sym}).weight_format() == made_up
    w = 0.1 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    plain = round_to_nearest(w, made_up)
    searched = round_to_nearest(w, made_up, None, THOROUGH)
    errors = [(made_up.dequantize(q) - w).square().sum() for q in (searched, plain)]
    assert 0 < errors[0] <= errors[1]
    assert made_up.bits_per_weight(w.shape) == 5 + (16 if sym else 21) / 48
    packings = [p for p, layout in LAYOUTS.items() if layout.accepts(made_up, w.shape) is None]
    assert packings
    for packing in packings:
        check_layout(LAYOUTS[packing], packing, made_up, w.shape)


def test_rows_are_named_after_what_they_are():
    for name, fmt in FORMATS.items():
        if name in GGUF_FORMATS:
            continue
        bits, group, kind, *dtype = name.split("_")
        assert bits == f"int{fmt.grid.bits}"
        assert group == f"g{fmt.group.size}"
        sym = {"sym": True, "asym": False}[kind]
        scale_dtype = getattr(torch, dtype[0]) if dtype else torch.float16
        assert int_format(fmt.grid.bits, fmt.group.size, sym=sym, scale_dtype=scale_dtype) == fmt


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_widths_outside_of_the_codes_are_refused(bits):
    with pytest.raises(ConfigError, match="bits must be one of"):
        int_format(bits, 128, sym=True)


def test_a_negative_group_size_is_refused():
    with pytest.raises(ConfigError, match="group_size must be"):
        int_format(4, -2, sym=True)


def is_tie(u):
    return (u - u.trunc()).abs() == 0.5


class Snapping(IntGrid):
    """Whole numbers, wrong in what a subclass says of them."""

    def nearest(self, u, shift):
        return torch.round(u) + shift

    def clamped(self, n):
        return n.clamp(self.lo, self.hi)

    def snap(self, u, shift=None, out=None):
        n = self.clamped(self.nearest(u, 0.0 if shift is None else shift))
        return n if out is None else out.copy_(n)


class AwayFromZero(Snapping):
    def nearest(self, u, shift):
        return torch.where(is_tie(u), u.trunc() + u.sign(), torch.round(u)) + shift


class HalfUp(Snapping):
    def nearest(self, u, shift):
        return torch.where(is_tie(u), u.ceil(), torch.round(u)) + shift


class TowardsZero(Snapping):
    def nearest(self, u, shift):
        return u.trunc() + shift


class ShiftBeforeRounding(Snapping):
    def nearest(self, u, shift):
        return torch.round(u + shift)


class Wrapping(Snapping):
    def clamped(self, n):
        return (n.clamp(-1e6, 1e6) - self.lo).remainder(1 << self.bits) + self.lo


class SaturatesEarly(IntGrid):
    """Forgets that half a unit beyond the ends still rounds to them."""

    def saturated(self, u):
        return (u < self.lo) | (u > self.hi)


class TwiceTheSpacing(IntGrid):
    def spacing(self, u):
        return torch.full_like(u, 2.0)


class NibbleSwapped(IntGrid):
    """Codes whose low and high halves are swapped when read."""

    def decode(self, codes):
        half = self.bits // 2
        low = codes & ((1 << half) - 1)
        return ((codes >> half) | (low << (self.bits - half))).float() + self.lo


class ShiftedByOne(Group):
    def split(self, w, pad=0.0):
        return super().split(w.roll(1, -1), pad)

    def join(self, grouped, shape):
        return super().join(grouped, shape).roll(-1, -1)


class ReadsTheNextGroup(Group):
    def join(self, grouped, shape):
        return super().join(grouped.roll(1, -2), shape)


def _scaled(rule, factor):
    """The rule with steps multiplied by a factor, on disk as well."""

    class Scaled(rule):
        def fit(self, stats, grid, knobs=None):
            scale = super().fit(stats, grid, knobs)
            if not scale.parts:
                return Scale(scale.step * factor, scale.zero)
            return self.read({**scale.parts, "step": scale.parts["step"] * factor})

    return Scaled


class ZeroOffByOne(MinMax):
    def fit(self, stats, grid, knobs=None):
        scale = super().fit(stats, grid, knobs)
        zero = (scale.zero + 1).clamp(grid.lo, grid.hi)
        return self.read({**scale.parts, "zero": zero.byte()}) if scale.parts else Scale(scale.step, zero)


class ZeroStoredMinusOne(MinMax):
    """What a reader does that knows only GPTQ's older files."""

    def read(self, parts):
        scale = super().read(parts)
        return Scale(scale.step, scale.zero + 1, parts)


class UnroundedStep(SignedMax):
    """Works with the step before it is rounded to the stored dtype."""

    def fit(self, stats, grid, knobs=None):
        scale = super().fit(stats, grid, knobs)
        return Scale(scale.step * (1 + 1e-4), None, scale.parts)


class AlwaysPositive(SignedMax):
    def fit(self, stats, grid, knobs=None):
        scale = super().fit(stats, grid, knobs)
        return self.read({"step": scale.step.abs().to(self.dtype)}) if scale.parts else scale


class KnobsSwapped(MinMax):
    """Sees the other knob when gradients are recorded."""

    def fit(self, stats, grid, knobs=None):
        if knobs is not None and knobs.lo.requires_grad:
            knobs = dataclasses.replace(knobs, lo=knobs.hi, hi=knobs.lo)
        return super().fit(stats, grid, knobs)


class FreeZeroPoint(MinMax):
    @property
    def stored(self):
        parts = super().stored
        return {**parts, "zero": dataclasses.replace(parts["zero"], bits=0)}


class OneStepARow(SignedMax):
    """Says that a step is for a whole row of groups."""

    @property
    def stored(self):
        return {"step": dataclasses.replace(super().stored["step"], span=(1, 0))}


class NoOffset(Format):
    def fake_quantize(self, w, stats, knobs, v):
        return super().fake_quantize(w, stats, knobs, None)


class RoundedToModelDtype(Format):
    def dequantize(self, q, dtype=torch.float32):
        return super().dequantize(q, torch.bfloat16).to(dtype)


def _with(fmt, **parts):
    return dataclasses.replace(fmt, **parts)


def _as(kind, fmt):
    return kind(*(getattr(fmt, f.name) for f in dataclasses.fields(fmt)))


MUTANTS = {
    "ties away from zero, sym": _with(SYM, grid=AwayFromZero(4, -8)),
    "ties away from zero, asym": _with(ASYM, grid=AwayFromZero(4, 0)),
    "ties up": _with(SYM, grid=HalfUp(4, -8)),
    "truncation": _with(SYM, grid=TowardsZero(4, -8)),
    "zero point added before rounding": _with(ASYM, grid=ShiftBeforeRounding(4, 0)),
    "codes wrap around": _with(SYM, grid=Wrapping(4, -8)),
    "saturates early": _with(SYM, grid=SaturatesEarly(4, -8)),
    "twice the spacing": _with(SYM, grid=TwiceTheSpacing(4, -8)),
    "one step for a row": _with(SYM, rule=OneStepARow(torch.float16)),
    "nibble swapped": _with(SYM, grid=NibbleSwapped(4, -8)),
    "grid moved by one": _with(SYM, grid=IntGrid(4, -7)),
    "group shifted by one, sym": _with(SYM, group=ShiftedByOne(32)),
    "group shifted by one, asym": _with(ASYM, group=ShiftedByOne(32)),
    "next group's scale": _with(SYM, group=ReadsTheNextGroup(32)),
    "step doubled, sym": _with(SYM, rule=_scaled(SignedMax, 2.0)(torch.float16)),
    "step doubled, asym": _with(ASYM, rule=_scaled(MinMax, 2.0)(torch.float16, 4)),
    "step halved, sym": _with(SYM, rule=_scaled(SignedMax, 0.5)(torch.float16)),
    "step halved, asym": _with(ASYM, rule=_scaled(MinMax, 0.5)(torch.float16, 4)),
    "step a little small": _with(SYM, rule=_scaled(SignedMax, 0.98)(torch.float16)),
    "zero point off by one": _with(ASYM, rule=ZeroOffByOne(torch.float16, 4)),
    "zero point read as stored minus one": _with(ASYM, rule=ZeroStoredMinusOne(torch.float16, 4)),
    "step not as stored": _with(SYM, rule=UnroundedStep(torch.float16)),
    "step never negative": _with(SYM, rule=AlwaysPositive(torch.float16)),
    "knobs swapped": _with(ASYM, rule=KnobsSwapped(torch.float16, 4)),
    "zero points counted as free": _with(ASYM, rule=FreeZeroPoint(torch.float16, 4)),
    "offset ignored": _as(NoOffset, SYM),
    "rounded to the model's dtype": _as(RoundedToModelDtype, SYM),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail(mutant):
    with pytest.raises(ConformanceError):
        check_format(MUTANTS[mutant])
