"""Second moments of inputs: which errors of a group cancel in the output, and what a search makes of it."""

from __future__ import annotations

import pytest
import torch

from auto_round.numerics.band import Band, CorrelatedBand, by_place
from auto_round.numerics.group import Group
from auto_round.numerics.importance import TILE, Importance
from auto_round.numerics.presets import GGUF_FORMATS, int_format
from auto_round.numerics.scale import Knobs
from auto_round.numerics.search import QUICK, THOROUGH, search_knobs


def inputs(n_in, tokens=2000, seed=0):
    """Inputs that share a few causes and have a mean, as those of a language model do."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, 16, generator=generator) @ torch.randn(16, n_in, generator=generator)
    own = torch.randn(tokens, n_in, generator=generator) * torch.rand(n_in, generator=generator)
    return causes / 4 + own + torch.randn(n_in, generator=generator) / 2


def importance_of(x):
    n_in = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -n_in % TILE)).reshape(len(x), -1, TILE)
    return Importance(x.square().mean(0), torch.einsum("tni,tnj->nij", padded, padded) / len(x))


def output_error(fmt, w, knobs, x):
    """Mean square of what each group's error does to the output, tile by tile, float64 `[rows, n_groups]`."""
    error = (fmt.dequantize(fmt.quantize(w, knobs)) - w).double()
    piece = Group(min(TILE, fmt.group.width(w.shape[1])))
    parts = torch.einsum("tgi,rgi->trg", piece.split(x.double()), piece.split(error))
    return parts.square().mean(0).reshape(len(w), fmt.group.count(w.shape[1]), -1).sum(-1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(fmt, w):
    ones = torch.ones(fmt.group.scale_shape(w.shape))
    return Knobs(ones, ones)


FORMATS = {
    "symmetric 128": int_format(4, 128, sym=True),
    "symmetric 32": int_format(2, 32, sym=True),
    "asymmetric 64": int_format(3, 64, sym=False),
    "asymmetric 256, two tiles a group": int_format(4, 256, sym=False),
    "a row": int_format(4, -1, sym=True),
    "q4_1": GGUF_FORMATS["q4_1"],
    "q2_k": GGUF_FORMATS["q2_k"],
    "q3_k": GGUF_FORMATS["q3_k"],
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


@every_format
@pytest.mark.parametrize("n_in", [512, 768])
def test_errors_of_groups_are_those_of_the_output(fmt, n_in):
    x, w = inputs(n_in), draw(6, n_in)
    importance = importance_of(x)
    products = importance.pieces(fmt.group, w.device)
    band = CorrelatedBand(fmt.group.split(w), products)
    got = band.error(fmt.grid, fmt.quantize(w).scale) * importance.mean
    torch.testing.assert_close(got.double(), output_error(fmt, w, measured(fmt, w), x), rtol=1e-3, atol=1e-6)


@every_format
def test_channels_with_nothing_in_common_are_weighed_by_their_squares(fmt):
    w, squares = draw(6, 512), torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.1
    alone = Importance(squares, torch.diag_embed(squares.reshape(-1, TILE)))
    scale = fmt.quantize(w).scale
    weight = by_place(fmt.group.split(alone.weights(w.device).expand(6, -1)))
    one = Band(by_place(fmt.group.split(w)), weight)
    other = CorrelatedBand(fmt.group.split(w), alone.pieces(fmt.group, w.device))
    torch.testing.assert_close(other.error(fmt.grid, scale), one.error(fmt.grid, scale), rtol=1e-4, atol=0)
    first, second = one.moments(fmt.grid, scale), other.moments(fmt.grid, scale)
    for name in ("one", "n", "w", "nn", "nw"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name), rtol=1e-4, atol=1e-2)


@every_format
@pytest.mark.parametrize("effort", [QUICK, THOROUGH], ids=["quick", "thorough"])
def test_products_lower_the_error_of_the_output(fmt, effort):
    x, w = inputs(512), draw(32, 512)
    known = importance_of(x)
    squares_only = output_error(fmt, w, search_knobs(fmt, w, Importance(known.squares), effort), x).sum()
    found = output_error(fmt, w, search_knobs(fmt, w, known, effort), x).sum()
    assert found < 0.97 * squares_only
    assert found < output_error(fmt, w, measured(fmt, w), x).sum()


@pytest.mark.parametrize("size", [48, 96, 192])
def test_groups_that_do_not_meet_the_tiles_are_searched_by_squares(size):
    fmt, x, w = int_format(4, size, sym=True), inputs(384), draw(4, 384)
    known = importance_of(x)
    assert known.pieces(fmt.group, w.device) is None
    got, want = (search_knobs(fmt, w, i, QUICK) for i in (known, Importance(known.squares)))
    assert torch.equal(got.lo, want.lo)
    assert torch.equal(got.hi, want.hi)


@pytest.mark.parametrize(
    ("size", "n_in", "count"), [(32, 200, 7), (128, 300, 3), (-1, 300, 3), (256, 512, 4)]
)
def test_short_groups_are_filled_with_what_costs_nothing(size, n_in, count):
    x = inputs(n_in)
    pieces = importance_of(x).pieces(Group(size), torch.device("cpu"))
    assert len(pieces) == count
    last = n_in - (count - 1) * pieces.shape[-1]
    assert (pieces[-1, last:] == 0).all()
    assert (pieces[-1, :, last:] == 0).all()
    want = x[:, -last:].T @ x[:, -last:] / len(x) / x.square().mean()
    torch.testing.assert_close(pieces[-1, :last, :last], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fmt", [FORMATS["symmetric 32"], FORMATS["asymmetric 64"], FORMATS["q2_k"]])
def test_empty_and_dead_channels_leave_finite_ranges(fmt):
    x, w = inputs(512), draw(4, 512)
    x[:, 5] = 0
    x[:, 256:] = 0
    w[0], w[1, :256] = 0, 0
    knobs = search_knobs(fmt, w, importance_of(x), THOROUGH)
    for side in (knobs.lo, knobs.hi):
        assert ((side >= 0) & (side <= 16)).all()
    seen = fmt.dequantize(fmt.quantize(w, knobs))
    assert torch.isfinite(seen).all()
    assert (seen[0] == 0).all()
