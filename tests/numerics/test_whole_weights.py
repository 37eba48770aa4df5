"""Numbers that belong to a whole weight: bound before rows are cut, taken along with experts and rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.kernels import reference
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import select_kernel
from auto_round.kernels.table import KERNELS
from auto_round.layouts.compressed_table import COMPRESSED
from auto_round.layouts.table import LAYOUTS
from auto_round.numerics import search
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.group import Group
from auto_round.numerics.importance import Importance
from auto_round.numerics.presets import GGUF_FORMATS, int_format
from auto_round.numerics.scale import Knobs, PartSpec
from auto_round.numerics.search import QUICK, search_knobs
from auto_round.testing.format_kit import check_format, random_weight
from auto_round.testing.grid_kit import ladder
from numerics.made_up import FORMAT, Ladder

SEEDS = st.integers(0, 2**31)
BLOCKS = {
    name: dataclasses.replace(int_format(4, size, sym=sym), group=Group(size, rows))
    for name, size, rows, sym in (("8 x 16", 16, 8, True), ("4 x 32", 32, 4, False), ("3 rows", -1, 3, True))
}
"""Groups of several rows, which no preset has yet."""
FORMATS = {
    "made up": FORMAT,
    "whole tensor": int_format(4, 0, sym=True),
    "asymmetric": int_format(3, 16, sym=False),
    "q4_k": GGUF_FORMATS["q4_k"],
    "q6_k": GGUF_FORMATS["q6_k"],
    **BLOCKS,
}


@given(name=st.sampled_from(sorted(FORMATS)), n=st.integers(1, 3), cut=st.integers(0, 2), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_part_of_a_weight_is_that_part(name, n, cut, seed):
    fmt = FORMATS[name]
    rows = slice(cut * fmt.group.rows, (cut + 2) * fmt.group.rows)
    q = fmt.quantize(random_weight((n, 4 * fmt.group.rows, 512), seed))
    whole = fmt.dequantize(q)
    for i in range(n):
        part = q.take((i,), rows)
        assert part.format == fmt
        assert torch.equal(fmt.dequantize(part), whole[i][rows])
        assert torch.equal(fmt.dequantize(q.take((i,))), whole[i])
        assert torch.equal(fmt.dequantize(q.take((i,)).take(rows=rows)), whole[i][rows])
        assert fmt.bits_per_weight(part.shape) > 0
    assert q.take() is q


def test_rows_inside_of_a_group_are_refused():
    q = BLOCKS["8 x 16"].quantize(random_weight((32, 64), 0))
    assert q.take(rows=slice(8, 32)).shape == (24, 64)
    with pytest.raises(UnsupportedError, match="8 rows share a scale"):
        q.take(rows=slice(4, 32))
    with pytest.raises(UnsupportedError, match="2 rows of groups share a number"):
        PartSpec(torch.float32, 32, span=(2, 0)).rows(slice(1, 4))


@given(span=st.tuples(st.integers(0, 4), st.integers(0, 4)), rows=st.integers(1, 9), groups=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_group_has_a_number_in_each_part(span, rows, groups):
    spec = PartSpec(torch.float32, 32, span)
    shape = spec.shape((2, rows, groups))
    blocks = [
        len({i // each if each else 0 for i in range(n)})
        for n, each in zip((rows, groups), span, strict=True)
    ]
    assert shape == (2, *blocks)
    taken = spec.rows(slice(0, rows))
    assert len(range(shape[1])[taken]) == shape[1]


@given(
    size=st.sampled_from([-1, 3, 8, 16]),
    rows=st.integers(1, 5),
    lead=st.lists(st.integers(1, 3), max_size=2),
    n_out=st.integers(1, 12),
    n_in=st.integers(1, 30),
)
@settings(max_examples=100, deadline=None)
def test_groups_of_several_rows_hold_rectangles(size, rows, lead, n_out, n_in):
    shape, group = (*lead, n_out, n_in), Group(size, rows)
    w = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    grouped = group.split(w)
    assert grouped.shape[:-1] == group.scale_shape(shape)
    assert torch.equal(group.join(grouped, shape), w)
    width = n_in if size == -1 else min(size, n_in)
    for r in range(0, n_out, rows):
        for g in range(0, n_in, width):
            want = w[..., r : r + rows, g : g + width].flatten(-2)
            found = grouped[..., r // rows, g // width, :]
            assert torch.equal(found.masked_select(found != 0), want.flatten())
    spread = group.spread(grouped.amax(-1), shape)
    assert spread.shape == w.shape
    assert torch.equal(group.split(spread).amax(-1), grouped.amax(-1))
    bands = list(group.bands(shape, 3 * n_in))
    assert torch.equal(torch.cat([w[b] for b, _ in bands]), w)
    assert torch.equal(torch.cat([grouped[s] for _, s in bands]), grouped)
    if lead and n_out > 3:
        assert len(bands) == lead[0]


@pytest.mark.parametrize(("size", "rows"), [(16, 0), (0, 2), (-2, 1)])
def test_impossible_groups_are_refused(size, rows):
    with pytest.raises(ConfigError, match="must be"):
        Group(size, rows)


@pytest.mark.parametrize("name", BLOCKS)
def test_formats_with_groups_of_several_rows_pass_the_kit(name):
    check_format(BLOCKS[name])


@pytest.mark.parametrize("name", BLOCKS)
def test_what_holds_groups_of_one_row_refuses_others(name):
    fmt = BLOCKS[name]
    for layout in {*LAYOUTS.values(), *COMPRESSED.values()}:
        assert layout.accepts(fmt, (96, 96)) is not None
    spec = LinearSpec(fmt, (96, 96), torch.float32, "cpu")
    assert select_kernel(spec).name == "torch"
    q = fmt.quantize(random_weight((96, 96), 0))
    kernel = KERNELS["torch"].kernel
    assert torch.equal(kernel.weight(kernel.prepare(q, spec), spec, torch.float32), fmt.dequantize(q))


@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_kernel_takes_rows_with_what_they_share(monkeypatch, name):
    fmt = FORMATS[name]
    monkeypatch.setattr(reference, "BAND", 512 * fmt.group.rows)
    q = fmt.quantize(random_weight((12 * fmt.group.rows + 1, 512), 0))
    spec = LinearSpec(fmt, q.shape, torch.float32, "cpu")
    kernel = KERNELS["torch"].kernel
    assert torch.equal(kernel.weight(kernel.prepare(q, spec), spec, torch.float32), fmt.dequantize(q))


@pytest.mark.parametrize("name", FORMATS)
def test_a_search_in_bands_finds_what_a_search_at_once_finds(monkeypatch, name):
    """Whatever a rule has to know of the whole weight, it knows before rows are cut."""
    fmt = FORMATS[name]
    w = random_weight((24, 512), 3)
    w[17] *= 8  # what is shared is decided in one band only
    at_once = search_knobs(fmt, w, None, QUICK)
    monkeypatch.setattr(search, "BAND", 1)
    for found, want in zip(vars_of(search_knobs(fmt, w, None, QUICK)), vars_of(at_once), strict=True):
        assert torch.equal(found, want)
    plain = (fmt.dequantize(fmt.quantize(w)) - w).square().sum()
    assert (fmt.dequantize(fmt.quantize(w, at_once)) - w).square().sum() <= plain


def vars_of(knobs):
    return knobs.lo, knobs.hi


@pytest.mark.parametrize("name", BLOCKS)
def test_what_flows_in_counts_for_groups_of_several_rows_too(name):
    fmt, x = BLOCKS[name], torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    x = x * torch.linspace(0.1, 3, 128)
    tile = (x.T @ x / 64).unsqueeze(0)
    known = Importance(tile[0].diagonal().clone(), tile)
    w = random_weight((24, 128), 4)

    def error(knobs):
        return ((fmt.dequantize(fmt.quantize(w, knobs)) - w).square() * known.squares).sum()

    found = error(search_knobs(fmt, w, known, QUICK))
    assert found < error(search_knobs(fmt, w, None, QUICK))
    assert found < 0.95 * error(None)


@given(seed=SEEDS, factor=st.sampled_from([0.25, 1.0, 3.0]))
@settings(max_examples=20, deadline=None)
def test_tied_weights_share_their_number(seed, factor):
    """Each of several weights gets what it would have as a part of one weight that holds them all."""
    q, k = random_weight((8, 64), seed), factor * random_weight((4, 64), seed + 1)
    fused = FORMAT.quantize(torch.cat([q, k]))
    stats = [FORMAT.stats(w) for w in (q, k)]
    for w, own, others, rows in (
        (q, stats[0], stats[1:], slice(0, 8)),
        (k, stats[1], stats[:1], slice(8, 12)),
    ):
        tied = FORMAT.bind(own, *others)
        assert tied == FORMAT
        assert hash(tied) == hash(FORMAT)
        assert tied.bind(own) is tied
        one = tied.quantize(w)
        part = fused.take(rows=rows)
        assert torch.equal(one.codes, part.codes)
        for name, value in part.scale.parts.items():
            assert torch.equal(one.scale.parts[name].float(), value.float())
        assert one.format.bound is None
        ones = torch.ones(FORMAT.group.scale_shape(w.shape))
        assert torch.equal(tied.fake_quantize(w, own, Knobs(ones, ones), None), FORMAT.dequantize(one))


def test_a_stack_is_bound_matrix_by_matrix():
    w = torch.stack([random_weight((4, 64), 0), 5 * random_weight((4, 64), 1)])
    stats, others = FORMAT.stats(w), FORMAT.stats(10 * w.flip(0))
    tied = FORMAT.bind(stats, others)
    found, alone = search_knobs(tied, w, None, QUICK), search_knobs(FORMAT, w, None, QUICK)
    for i in range(2):
        one = search_knobs(FORMAT.bind(stats[i], others[i]), w[i], None, QUICK)
        assert torch.equal(found.lo[i], one.lo)
        assert torch.equal(alone.lo[i], search_knobs(FORMAT, w[i], None, QUICK).lo)


@given(st.one_of(st.builds(IntGrid, st.integers(2, 8), st.sampled_from([0, -8])), st.just(Ladder())))
@settings(max_examples=20, deadline=None)
def test_a_grid_tells_its_spacing_and_its_ends(grid):
    rungs = ladder(grid)
    between = (rungs[:-1] + rungs[1:]) / 2 + 1e-3 * rungs.diff()
    spacing = grid.spacing(between)
    assert torch.equal(torch.ones_like(between) if spacing is None else spacing, rungs.diff())
    first, last = rungs.diff()[0], rungs.diff()[-1]
    inside = torch.stack([rungs[0] - 0.499 * first, rungs[-1] + 0.499 * last, *rungs])
    outside = torch.stack([rungs[0] - 0.501 * first, rungs[-1] + 0.501 * last])
    assert not grid.saturated(inside).any()
    assert grid.saturated(outside).all()


def test_an_offset_is_one_of_the_grids_own_spaces():
    """An offset of a space moves every weight to the next number, however far that is."""
    step = 0.5
    w = step * torch.tensor([[0.5, 1.0, 1.5, 2.0, 3.0, 4.0, -2.0, -3.0, 6.0, *[0.0] * 7]])
    moved = FORMAT.dequantize(FORMAT.quantize(w, None, torch.full_like(w, 1.0))) / step
    want = torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -1.0, -2.0, 6.0])
    torch.testing.assert_close(moved[0, :9], want)
    v = torch.zeros_like(w, requires_grad=True)
    fake = FORMAT.fake_quantize(w, FORMAT.stats(w), None, v)
    (slope,) = torch.autograd.grad(fake.sum(), v)
    torch.testing.assert_close(slope[0, :6] / step, torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0, 2.0]))


def test_steps_of_ranges_follow_the_grid():
    assert [IntGrid(bits, 0).end_steps for bits in (2, 4, 8)] == [2, 8, 128]
    assert IntGrid(4, -8).end_steps == 8
    assert Ladder().end_steps == 3
