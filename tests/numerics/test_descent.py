"""Coordinate descent over codes: never worse than nearest, and what a slow version of it finds."""

from __future__ import annotations

import pytest
import torch

from auto_round.numerics.descent import cancelling_offsets
from auto_round.numerics.importance import TILE, Importance
from auto_round.numerics.presets import FORMATS
from auto_round.numerics.presets_float import FLOAT_FORMATS
from auto_round.numerics.search import QUICK, search_knobs

EVERY = {**FORMATS, **FLOAT_FORMATS}


def inputs_that_go_together(n_in, seed=0, tokens=600):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=generator) * 0.5 + torch.eye(n_in)
    x = torch.randn(tokens, n_in, generator=generator) @ mix * torch.rand(n_in, generator=generator)
    filled = torch.nn.functional.pad(x, (0, -n_in % TILE)).reshape(tokens, -1, TILE)
    products = torch.einsum("nti,ntj->tij", filled, filled) / tokens
    return Importance(x.square().mean(0), products)


def error(importance, w, back):
    """Mean square of what the layer gives, tile by tile."""
    e = torch.nn.functional.pad(back - w, (0, -w.shape[-1] % TILE)).reshape(*w.shape[:-1], -1, TILE)
    return torch.einsum("...ti,tij,...tj->", e, importance.products, e)


def weight(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EVERY)
def test_errors_cancel_in_every_format(name):
    fmt, w = EVERY[name], weight(24, 512)
    importance = inputs_that_go_together(512)
    fmt = fmt.bind(fmt.stats(w))
    knobs = search_knobs(fmt, w, importance, QUICK)
    nearest = error(importance, w, fmt.dequantize(fmt.quantize(w, knobs)))
    errors = [nearest]
    for sweeps in (1, 2):
        q = fmt.quantize(w, knobs, cancelling_offsets(fmt, w, knobs, importance, sweeps))
        errors.append(error(importance, w, fmt.dequantize(q)))
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] <= errors[1]


@pytest.mark.parametrize("name", ["int4_g32_sym", "int4_g32_asym", "nvfp4", "mxfp4"])
def test_one_sweep_in_plain_python(name):
    """Weight after weight in float64; a tie of rounding may fall otherwise, hence the few exceptions."""
    fmt, n_in = EVERY[name], 160
    w = weight(3, n_in)
    importance = inputs_that_go_together(n_in, seed=3)
    v = cancelling_offsets(fmt, w, None, importance, 1)
    got = fmt.quantize(w, None, v)
    want = fmt.quantize(w)
    step, zero = (
        None if x is None else fmt.group.spread(x, w.shape).double()
        for x in (want.scale.step, want.scale.zero)
    )
    zero = torch.zeros_like(step) if zero is None else zero
    numbers = fmt.grid.decode(torch.arange(1 << fmt.grid.bits, dtype=torch.uint8)).double().unique()
    e = (fmt.grid.decode(want.codes).double() - zero) * step - w.double()
    h = importance.products.double()
    for row in range(3):
        for j in range(n_in):
            tile = slice(j // TILE * TILE, min(n_in, (j // TILE + 1) * TILE))
            products = h[j // TILE, j % TILE, : tile.stop - tile.start]
            others = (products * e[row, tile]).sum() - h[j // TILE, j % TILE, j % TILE] * e[row, j]
            aim = w[row, j].double() - others / h[j // TILE, j % TILE, j % TILE]
            candidates = (numbers - zero[row, j]) * step[row, j]
            e[row, j] = candidates[(candidates - aim).abs().argmin()] - w[row, j].double()
    back = fmt.dequantize(got).double()
    assert ((back - w - e).abs() > 1e-5).sum() <= 2


def test_nearest_numbers_need_no_offset():
    w = weight(8, 256)
    fmt = EVERY["int4_g32_sym"]
    apart = Importance(torch.ones(256), torch.eye(TILE).expand(2, TILE, TILE))
    assert not cancelling_offsets(fmt, w, None, apart, 2).any()


@pytest.mark.parametrize("importance", [None, Importance(torch.ones(64)), Importance(torch.zeros(64))])
def test_without_products_nothing_is_done(importance):
    assert cancelling_offsets(EVERY["mxfp4"], weight(4, 64), None, importance, 2) is None


def test_no_sweeps():
    assert cancelling_offsets(EVERY["mxfp4"], weight(4, 64), None, inputs_that_go_together(64), 0) is None


def test_matrices_of_a_stack_are_rounded_one_by_one():
    fmt, w = EVERY["nvfp4"], weight(2, 3, 8, 160)
    importance = inputs_that_go_together(160)
    fmt = fmt.bind(fmt.stats(w))
    v = cancelling_offsets(fmt, w, None, importance, 1)
    for i in range(2):
        for j in range(3):
            alone = cancelling_offsets(fmt.matrix(3 * i + j), w[i, j], None, importance, 1)
            assert torch.equal(v[i, j], alone)


def test_bands_do_not_show(monkeypatch):
    fmt, w = EVERY["int4_g32_asym"], weight(40, 160)
    importance = inputs_that_go_together(160)
    whole = fmt.quantize(w, None, cancelling_offsets(fmt, w, None, importance, 2)).codes
    monkeypatch.setattr("auto_round.numerics.descent.BAND", 160 * 7)
    assert torch.equal(fmt.quantize(w, None, cancelling_offsets(fmt, w, None, importance, 2)).codes, whole)
