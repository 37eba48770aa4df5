"""Formats whose groups share numbers: mutants fail the kit, gradients flow, the search is worth its time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from auto_round.numerics.importance import Importance
from auto_round.numerics.multiples import Multiples
from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.numerics.scale import Knobs, Scale
from auto_round.numerics.scale_power import PowerOfTwo
from auto_round.numerics.scale_two_level import SharedAffine, SharedSigned
from auto_round.numerics.search import QUICK, THOROUGH, search_knobs
from auto_round.testing.failure import ConformanceError
from auto_round.testing.format_kit import check_format, random_case

TWO_LEVEL = {name: fmt for name, fmt in GGUF_FORMATS.items() if name.endswith("_k")}
Q4, Q3 = GGUF_FORMATS["q4_k"], GGUF_FORMATS["q3_k"]
STEPS, FLOORS = Multiples(6, 8, 1), Multiples(6, 8, 0)
every_type = pytest.mark.parametrize("name", GGUF_FORMATS)


class HalfTheRange(Multiples):
    """Uses half of the multiples."""

    def share(self, x):
        return super().share(2 * x)


class Truncating(Multiples):
    def divide(self, x, shared):
        return super().divide(
            x - x.sign() * 0.45 * shared.abs().repeat_interleave(self.per, -1)[..., : x.shape[-1]], shared
        )


class NextBlock(Multiples):
    """Reads the shared number of the block after."""

    def read(self, shared, multiple):
        return super().read(shared.roll(-1, -1), multiple)

    def share(self, x):
        return super().share(x)


class ZeroMultiples(Multiples):
    def divide(self, x, shared):
        return super().divide(x, shared) * (x.abs() > 0.3 * x.abs().amax(-1, keepdim=True))


class OneNumberForAll(Multiples):
    """All blocks of a row share the largest number."""

    def share(self, x):
        shared = super().share(x)
        largest = shared.abs().argmax(-1, keepdim=True)
        return shared.gather(-1, largest).expand_as(shared)


class FloorAdded(SharedAffine):
    def read(self, parts):
        scale = super().read(parts)
        return Scale(scale.step, None, parts, -scale.floor)


class UnroundedShare(SharedSigned):
    def fit(self, stats, grid, knobs=None):
        scale = super().fit(stats, grid, knobs)
        return Scale(scale.step * (1 + 2**-13), None, scale.parts)


class FreeShare(SharedSigned):
    @property
    def stored(self):
        parts = super().stored
        return {**parts, "d": dataclasses.replace(parts["d"], bits=0)}


def _with(fmt, rule):
    return dataclasses.replace(fmt, rule=rule)


MUTANTS = {
    "half the range, affine": _with(Q4, SharedAffine(HalfTheRange(6, 8, 1), FLOORS)),
    "half the range of floors": _with(Q4, SharedAffine(STEPS, HalfTheRange(6, 8, 0))),
    "half the range, signed": _with(Q3, SharedSigned(HalfTheRange(6, 16, -32))),
    "multiples cut off": _with(Q4, SharedAffine(Truncating(6, 8, 1), FLOORS)),
    "next block's number": _with(Q4, SharedAffine(NextBlock(6, 8, 1), FLOORS)),
    "next block's number, signed": _with(Q3, SharedSigned(NextBlock(6, 16, -32))),
    "multiples of 0": _with(Q3, SharedSigned(ZeroMultiples(6, 16, -32))),
    "one number for all blocks": _with(Q3, SharedSigned(OneNumberForAll(6, 16, -32))),
    "floor added": _with(Q4, FloorAdded(STEPS, FLOORS)),
    "shared number not as stored": _with(Q3, UnroundedShare(Multiples(6, 16, -32))),
    "shared number counted as free": _with(Q3, FreeShare(Multiples(6, 16, -32))),
    "multiples that do not fit their bits": _with(Q3, SharedSigned(Multiples(5, 16, -32))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail(mutant):
    with pytest.raises(ConformanceError):
        check_format(MUTANTS[mutant])


@pytest.mark.parametrize("name", TWO_LEVEL)
def test_gradients_reach_every_knob(name):
    """Groups inside the range of multiples: a wider range costs something everywhere."""
    fmt = TWO_LEVEL[name]
    case = random_case(fmt, (4, 512), 0)
    knobs = Knobs(*(k.clone().requires_grad_() for k in (case.knobs.lo, case.knobs.hi)))
    v = torch.zeros_like(case.w, requires_grad=True)
    upstream = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    out = fmt.fake_quantize(case.w, fmt.stats(case.w), knobs, v)
    lo, hi, moved = torch.autograd.grad((out * upstream).sum(), [knobs.lo, knobs.hi, v])
    reached = (lo != 0) | (hi != 0)
    assert reached.float().mean() > 0.9
    for gradient in (lo, hi, moved):
        assert torch.isfinite(gradient).all()
    step = fmt.quantize(case.w, case.knobs).scale.step.repeat_interleave(fmt.group.size, -1)
    inside = moved != 0
    torch.testing.assert_close(moved[inside], (step * upstream)[inside])


def test_the_gradient_of_a_step_passes_through_its_multiple():
    """A group whose multiple is rounded gets the gradient of its unrounded step."""
    fmt = Q3
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 256, generator=generator) * torch.rand(1, 16, generator=generator).repeat_interleave(
        16, -1
    )
    ones = torch.ones(1, 16)
    knobs = Knobs(ones.clone().requires_grad_(), ones.clone().requires_grad_())
    stats = fmt.stats(w)
    upstream = torch.randn(1, 16, generator=generator)
    scale = fmt.rule.fit(stats, fmt.grid, knobs)
    got = torch.autograd.grad((scale.step * upstream).sum(), [knobs.lo, knobs.hi])
    alone = fmt.rule.alone.fit(stats, fmt.grid, knobs)
    want = torch.autograd.grad((alone.step * upstream).sum(), [knobs.lo, knobs.hi])
    others = torch.arange(16) != alone.step.detach().abs().argmax()
    for g, w_ in zip(got, want, strict=True):
        torch.testing.assert_close(g[:, others], w_[:, others])


def errors(fmt, w, knobs, importance=None):
    square = (fmt.dequantize(fmt.quantize(w, knobs)).double() - w.double()).square()
    return (square if importance is None else square * importance).sum()


@given(
    name=st.sampled_from(list(GGUF_FORMATS)),
    effort=st.sampled_from([QUICK, THOROUGH]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(name="mxfp4", effort=QUICK, weighted=False, seed=141)
@settings(max_examples=20, deadline=None)
def test_the_search_lowers_the_error(name, effort, weighted, seed):
    fmt = GGUF_FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(4, 512, generator=generator)
    importance = torch.rand(512, generator=generator) + 0.01 if weighted else None
    found = search_knobs(fmt, w, None if importance is None else Importance(importance), effort)
    assert all(bool(((k >= 0) & (k <= 16)).all()) for k in (found.lo, found.hi))
    after, before = errors(fmt, w, found, importance), errors(fmt, w, None, importance)
    # A step that is a power of two has so few neighbours that the plain one may be the best of each group.
    unchanged = isinstance(fmt.rule, PowerOfTwo) and all(bool((k == 1).all()) for k in (found.lo, found.hi))
    assert after == before if unchanged else after < before


GAIN = {"q2_k": 0.70, "q3_k": 0.85, "q4_k": 0.85, "q5_k": 0.87, "q6_k": 0.9}
"""Weighted error after the search over that before: what has to be reached on weights as in `gain`."""


@pytest.mark.parametrize("name", TWO_LEVEL)
def test_the_search_is_worth_its_time(name):
    fmt = TWO_LEVEL[name]
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, 1024, generator=generator) * (0.5 + torch.rand(16, 1024, generator=generator))
    importance = torch.rand(1024, generator=generator).square() + 0.01
    plain = errors(fmt, w, None, importance)
    quick, thorough = (
        errors(fmt, w, search_knobs(fmt, w, Importance(importance), e), importance) for e in (QUICK, THOROUGH)
    )
    assert quick < GAIN[name] * plain
    assert thorough < 1.01 * quick


@pytest.mark.parametrize("name", TWO_LEVEL)
def test_knobs_lead_to_the_scales_they_were_made_from(name):
    fmt = TWO_LEVEL[name]
    w = torch.randn(4, 512, generator=torch.Generator().manual_seed(2))
    stats = fmt.stats(w)
    scale = fmt.quantize(w, random_case(fmt, w.shape, 0).knobs).scale
    knobs = fmt.rule.knobs(stats, fmt.grid, scale.step, scale.floor)
    again = fmt.quantize(w, knobs).scale
    for part, value in scale.parts.items():
        assert torch.equal(again.parts[part], value)


@every_type
def test_rows_with_nothing_in_them_survive_the_search(name):
    fmt = GGUF_FORMATS[name]
    w = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    w[0], w[1, :256], w[2] = 0, 0, w[2] * 1e-30
    w[3] = w[3].abs()
    seen = fmt.dequantize(fmt.quantize(w, search_knobs(fmt, w, Importance(torch.ones(512)), THOROUGH)))
    assert torch.isfinite(seen).all()
    assert (seen[0] == 0).all()
    assert (seen[1, :256] == 0).all()
