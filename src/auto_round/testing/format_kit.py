"""Conformance kit for numeric formats: any row of the table has to pass `check_format`.

The kit spreads scales over weights and looks for the nearest number by itself, so that an error made the same
way in both directions (a group shifted by one, a step doubled) does not cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import NumericsError
from auto_round.numerics.format import CHUNK, Format
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import Knobs
from auto_round.numerics.scale_integer import SignedMax
from auto_round.numerics.scale_power import PowerOfTwo
from auto_round.testing.failure import require
from auto_round.testing.grid_kit import check_grid, ladder
from auto_round.testing.step_kit import check_steps_are_nearest
from auto_round.testing.two_level_kit import check_two_level, floor_error, step_error

SHAPES = ((6, 96), (5, 80), (3, 4, 40), (2, 7))
"""Weights `[..., out, in]`: whole groups, short last groups, experts, a row shorter than a group."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROUNDING = 1e-4
"""What float32 may err by, in units of the step, when a weight of up to 256 steps is divided by its step."""


@dataclass(frozen=True, slots=True)
class Case:
    """What may be handed to a format: a weight, range multipliers and rounding offsets."""

    w: Tensor
    knobs: Knobs | None
    v: Tensor | None


def random_weight(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight with rows around zero, off center, and on one side of it."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    center = torch.randint(-2, 3, (*shape[:-1], 1), generator=generator) * 0.7
    return (0.5 * (w + center)).to(dtype)


def large_weight(shape: tuple[int, ...], seed: int) -> Tensor:
    """Weight of at least 0.25 everywhere: even a group of one has a step in the normal range of float16."""
    w = random_weight(shape, seed)
    return w + 0.25 * w.sign()


def random_case(
    fmt: Format, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, reach: float = 1.0
) -> Case:
    """Random weight, knobs in 0.4 ... 1.2 and offsets in `-reach ... reach`."""
    generator = torch.Generator().manual_seed(seed + 1)
    groups = fmt.group.scale_shape(shape)
    lo, hi = (0.4 + 0.8 * torch.rand(groups, generator=generator) for _ in range(2))
    v = reach * (2 * torch.rand(shape, generator=generator) - 1)
    return Case(random_weight(shape, seed, dtype), Knobs(lo, hi), v)


def check_format(fmt: Format, *, seed: int = 0, spare: float = 1.0) -> None:
    """Check every promise of a format.

    Args:
        fmt: the format.
        seed: of the random weights.
        spare: how much wider than the measured range the grid may be laid; 1 where the step follows the range
            closely, 2 where steps are powers of two.

    Raises:
        ConformanceError: a promise is broken.
    """
    zero = fmt.quantize(random_weight((2, 32), 0)).scale.zero
    check_grid(fmt.grid, f"grid of {fmt.name}", shifted=zero is not None)
    for shape in SHAPES:
        _check_nearest(fmt, random_case(fmt, shape, seed))
        _check_range(fmt, large_weight(shape, seed), spare)
        _check_extremes(fmt, large_weight(shape, seed))
        _check_scale(fmt, random_case(fmt, shape, seed))
        for dtype in DTYPES:
            _check_fake(fmt, random_case(fmt, shape, seed, dtype))
    for check in CHECKS:
        check(fmt, seed)


def _check_nearest(fmt: Format, case: Case) -> None:
    """Each weight gets the nearest of all numbers that its own group's scale can give."""
    u, n = _in_steps(fmt, case.w, case.knobs)
    numbers = ladder(fmt.grid).double()
    best = (u.unsqueeze(-1) - numbers).abs().amin(-1)
    slack = ROUNDING + 4 * torch.finfo(torch.float32).eps * u.abs()
    require(
        bool(((u - n).abs() <= best + slack).all()), f"{fmt.name}: a weight is not rounded to the nearest"
    )


def _in_steps(fmt: Format, w: Tensor, knobs: Knobs | None) -> tuple[Tensor, Tensor]:
    """Weight on the scale of grid numbers, unrounded and as quantized, float64 of the shape of `w`."""
    q = fmt.quantize(w, knobs)
    step = spread(fmt, q.scale.step, q.shape)
    zero = torch.zeros(()) if q.scale.zero is None else spread(fmt, q.scale.zero, q.shape)
    floor = torch.zeros(()) if q.scale.floor is None else spread(fmt, q.scale.floor, q.shape)
    seen = fmt.dequantize(q, torch.float64)
    return (w.double() + floor) / step + zero, (seen + floor) / step + zero


def spread(fmt: Format, per_group: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Value of each weight's own group, float64 of `shape`."""
    size = fmt.group.size if fmt.group.size > 0 else shape[-1]
    group_of, row_of = torch.arange(shape[-1]) // size, torch.arange(shape[-2]) // fmt.group.rows
    if fmt.group.size == 0:
        return per_group.double().expand(shape)
    return per_group.double()[..., row_of, :][..., group_of]


def _check_range(fmt: Format, w: Tensor, spare: float) -> None:
    """The measured range is covered, and the grid is not laid wider than it needs to be."""
    q = fmt.quantize(w)
    u, n = _in_steps(fmt, w, None)
    numbers = ladder(fmt.grid)
    gap = float(numbers.diff().max())
    eps = _step_eps(q)
    step = q.scale.step.abs()
    sided = q.scale.zero is None and q.scale.floor is None
    floor = torch.zeros_like(step) if q.scale.floor is None else q.scale.floor
    # Rounding a step to its dtype moves each end of the grid by the unit roundoff times all levels.
    off = (eps / 2 * step + step_error(fmt, q)) * float(numbers[-1] - numbers[0])
    off = off + eps / 2 * floor + floor_error(fmt, q)
    slack = off / step + ROUNDING
    clip = gap if sided else gap / 2
    if isinstance(fmt.rule, PowerOfTwo):  # by the rule of the power, extremes may saturate by more
        clip = max(clip, fmt.rule.most - fmt.grid.hi)
    covered = (u - n).abs() <= clip + spread(fmt, slack, q.shape)
    require(bool(covered.all()), f"{fmt.name}: the range does not cover the weights")
    zero = torch.zeros_like(step) if q.scale.zero is None else q.scale.zero
    ends = [(end - zero) * q.scale.step - floor for end in (numbers[0], numbers[-1])]
    far = torch.maximum(ends[0].abs(), ends[1].abs())
    stats = fmt.stats(w)
    wanted = torch.maximum(-stats.lo, stats.hi) * spare
    # A multiple is lifted to 1 where the nearest one is 0: as much as rounding moves others, once more.
    wide = far > wanted * (1 + eps) + step * (gap / 2 + ROUNDING) + 2 * off
    require(not bool(wide.any()), f"{fmt.name}: the grid is laid wider than the weights")


def _check_extremes(fmt: Format, w: Tensor) -> None:
    """Symmetric formats map the larger extreme to their lowest number, exact but for the rounded step."""
    if not isinstance(fmt.rule, SignedMax):
        return
    q, stats = fmt.quantize(w), fmt.stats(w)
    extreme = w.abs() >= spread(fmt, torch.maximum(-stats.lo, stats.hi), q.shape)
    lowest = fmt.grid.encode(torch.tensor(fmt.grid.lo, dtype=torch.float32))
    require(bool((q.codes[extreme] == lowest).all()), f"{fmt.name}: an extreme is not at the lowest number")
    error = (fmt.dequantize(q)[extreme] - w[extreme]).abs()
    exact = error <= _step_eps(q) / 2 * w[extreme].abs()
    require(bool(exact.all()), f"{fmt.name}: an extreme is not exact")


def _step_eps(q: QTensor) -> float:
    """Distance of neighbouring numbers near 1 in the dtype of the stored step; 0 for exact steps."""
    parts = [p for p in q.scale.parts.values() if p.is_floating_point()]
    return max((torch.finfo(p.dtype).eps for p in parts), default=0.0)


def _check_fake(fmt: Format, case: Case) -> None:
    """`fake_quantize` is `dequantize(quantize)`, with and without knobs and offsets; nothing is changed."""
    where = f"{fmt.name} {case.w.dtype} {list(case.w.shape)}"
    before = case.w.clone()
    stats = fmt.stats(case.w)
    for knobs in (None, case.knobs):
        for v in (None, case.v):
            fake = fmt.fake_quantize(case.w, stats, knobs, v)
            real = fmt.dequantize(fmt.quantize(case.w, knobs, v))
            require(fake.dtype == torch.float32, f"{where}: fake_quantize gives {fake.dtype}")
            require(torch.equal(fake, real), f"{where}: fake_quantize is not dequantize(quantize)")
            if knobs is not None:
                trained = Knobs(*(k.clone().requires_grad_() for k in (knobs.lo, knobs.hi)))
                moved = None if v is None else v.clone().requires_grad_()
                fake = fmt.fake_quantize(case.w, stats, trained, moved)
                require(
                    torch.equal(fake, real), f"{where}: fake_quantize differs while gradients are recorded"
                )
    require(torch.equal(case.w, before), f"{where}: the weight was changed")


def _check_scale(fmt: Format, case: Case) -> None:
    """What is stored says everything about the scale, in the promised shape and number of bits."""
    q = fmt.quantize(case.w, case.knobs)
    require(q.codes.dtype == torch.uint8, f"{fmt.name}: codes are {q.codes.dtype}")
    require(q.shape == tuple(case.w.shape), f"{fmt.name}: codes of {q.shape} for {list(case.w.shape)}")
    require(int(q.codes.max()) < 1 << fmt.grid.bits, f"{fmt.name}: a code has more than {fmt.grid.bits} bits")
    groups = fmt.group.scale_shape(q.shape)
    back = fmt.rule.read(q.scale.parts)
    for name, given, read in (
        ("step", q.scale.step, back.step),
        ("zero", q.scale.zero, back.zero),
        ("floor", q.scale.floor, back.floor),
    ):
        if given is None or read is None:
            require(given is read, f"{fmt.name}: {name} is lost on the way to disk")
            continue
        require(given.dtype == torch.float32, f"{fmt.name}: {name} is {given.dtype}")
        require(tuple(given.shape) == groups, f"{fmt.name}: {name} is {list(given.shape)}, wanted {groups}")
        require(torch.equal(given, read), f"{fmt.name}: {name} is not what is stored")
        if name in q.scale.parts:
            require(torch.equal(given, q.scale.parts[name].float()), f"{fmt.name}: {name} is read wrongly")
    require(bool((q.scale.step != 0).all()), f"{fmt.name}: a step is zero")
    _check_parts(fmt, q)


def _check_parts(fmt: Format, q: QTensor) -> None:
    """Parts have the names, dtypes and shapes that were announced, and take the bits that are claimed."""
    specs, groups = fmt.rule.stored, fmt.group.scale_shape(q.shape)
    found = {name: (part.dtype, tuple(part.shape)) for name, part in q.scale.parts.items()}
    announced = {name: (spec.dtype, spec.shape(groups)) for name, spec in specs.items()}
    require(found == announced, f"{fmt.name}: stores {found}, announced {announced}")
    stored = q.codes.numel() * fmt.grid.bits
    for name, part in q.scale.parts.items():
        bits = specs[name].bits
        if part.is_floating_point():
            require(bits == torch.finfo(part.dtype).bits, f"{fmt.name}: {name} does not take {bits} bits")
        else:
            lowest = -(1 << (bits - 1)) if torch.iinfo(part.dtype).min < 0 else 0
            inside = (part.to(torch.int32) >= lowest) & (part.to(torch.int32) < lowest + (1 << bits))
            require(bool(inside.all()), f"{fmt.name}: {name} does not fit {bits} bits")
        stored += part.numel() * bits
    claimed = fmt.bits_per_weight(q.shape) * q.codes.numel()
    require(round(claimed, 6) == stored, f"{fmt.name}: {claimed} bits are claimed and {stored} are stored")


def _check_power_of_two(fmt: Format, seed: int) -> None:
    """Weights times a power of two: the same codes and zero points, steps times that power."""
    case = random_case(fmt, (6, 80), seed)
    # Large enough for steps, and numbers that groups share, to stay in the normal range of float16.
    w = 64 * large_weight((6, 80), seed)
    q = fmt.quantize(w, case.knobs, case.v)
    for k in (-2, 1, 4):
        scaled = fmt.quantize(w * 2.0**k, case.knobs, case.v)
        require(torch.equal(scaled.codes, q.codes), f"{fmt.name}: a power of two changes codes")
        require(torch.equal(scaled.scale.step, q.scale.step * 2.0**k), f"{fmt.name}: steps do not scale")
        if q.scale.floor is not None and scaled.scale.floor is not None:
            floor = q.scale.floor * 2.0**k
            require(torch.equal(scaled.scale.floor, floor), f"{fmt.name}: floors do not scale")
        if q.scale.zero is not None and scaled.scale.zero is not None:
            require(
                torch.equal(scaled.scale.zero, q.scale.zero), f"{fmt.name}: a power of two moves zero points"
            )


def _check_rows(fmt: Format, seed: int) -> None:
    """Rows, matrices and the layout in memory do not matter to the result."""
    case = random_case(fmt, (6, 80), seed)
    order = torch.tensor([3, 0, 5, 1, 4, 2]) if fmt.group.rows == 1 else torch.arange(6)
    w, v = case.w, case.v
    q = fmt.quantize(w, None, v)
    moved = fmt.quantize(w[order], None, None if v is None else v[order])
    require(torch.equal(moved.codes, q.codes[order]), f"{fmt.name}: permuted rows get other codes")
    for name, part in q.scale.parts.items():
        by_row = fmt.group.size != 0 and fmt.rule.stored[name].span[0] == 1
        wanted = part[order] if by_row and fmt.group.rows == 1 else part
        require(torch.equal(moved.scale.parts[name], wanted), f"{fmt.name}: permuted rows get other {name}")
    _same(fmt.quantize(w.t().contiguous().t(), None, v), q, f"{fmt.name}: a transposed layout")
    ones = torch.ones(fmt.group.scale_shape(w.shape))
    _same(fmt.quantize(w, Knobs(ones, ones), v), q, f"{fmt.name}: knobs of 1")
    _same(fmt.quantize(w, None, torch.zeros_like(w)), fmt.quantize(w), f"{fmt.name}: offsets of 0")
    pair = fmt.quantize(torch.stack([w, w.flip(0)]))
    for i, one in enumerate((w, w.flip(0))):
        alone = fmt.quantize(one)
        require(torch.equal(pair.codes[i], alone.codes), f"{fmt.name}: experts get other codes than matrices")
        for name, part in alone.scale.parts.items():
            require(torch.equal(pair.scale.parts[name][i], part), f"{fmt.name}: experts get other {name}")


def _check_parts_of_weights(fmt: Format, seed: int) -> None:
    """What is taken from a quantized weight is that part of it, with the numbers that it shares."""
    rows = 3 * fmt.group.rows
    w = torch.stack([random_weight((rows, 40), seed), 3 * random_weight((rows, 40), seed + 1)])
    q = fmt.quantize(w)
    for cut in (slice(None), slice(0, fmt.group.rows), slice(fmt.group.rows, rows)):
        for i in range(2):
            part = q.take((i,), cut)
            require(torch.equal(part.codes, q.codes[i][cut]), f"{fmt.name}: other codes are taken")
            seen, want = fmt.dequantize(part), fmt.dequantize(q)[i][cut]
            require(torch.equal(seen, want), f"{fmt.name}: {cut} of matrix {i} is taken with another scale")
            _check_parts(fmt, part)


def _check_bands(fmt: Format, seed: int) -> None:
    """A matrix quantized in bands of rows is the matrix quantized at once, as a pile of one matrix is."""
    shape = (CHUNK // 80 + 3, 80)
    case = random_case(fmt, shape, seed)
    pile = None if case.knobs is None else Knobs(case.knobs.lo[None], case.knobs.hi[None])
    whole = fmt.quantize(case.w[None], pile, None if case.v is None else case.v[None])
    parts = {name: part[0] for name, part in whole.scale.parts.items()}
    at_once = QTensor(whole.codes[0], fmt.rule.read(parts), fmt)
    _same(fmt.quantize(case.w, case.knobs, case.v), at_once, f"{fmt.name}: bands of rows")


def _same(got: QTensor, want: QTensor, what: str) -> None:
    require(torch.equal(got.codes, want.codes), f"{what}: other codes")
    require(got.scale.parts.keys() == want.scale.parts.keys(), f"{what}: other parts")
    for name, part in want.scale.parts.items():
        require(torch.equal(got.scale.parts[name], part), f"{what}: other {name}")


def _check_zeros(fmt: Format, seed: int) -> None:
    """A group of zeros gives zeros, whatever the others hold."""
    w = random_weight((3, 64), seed)
    w[1] = 0
    for values in (torch.zeros(3, 64), w):
        seen = fmt.dequantize(fmt.quantize(values))
        require(bool((seen[1] == 0).all()), f"{fmt.name}: zeros do not stay zero")
        ones = torch.ones(fmt.group.scale_shape(values.shape))
        knobs = Knobs(ones.clone().requires_grad_(), ones.clone().requires_grad_())
        fake = fmt.fake_quantize(values, fmt.stats(values), knobs, None)
        require(torch.equal(fake, seen), f"{fmt.name}: fake_quantize differs on zeros")
        for gradient in torch.autograd.grad(fake.square().sum(), [knobs.lo, knobs.hi]):
            require(bool(torch.isfinite(gradient).all()), f"{fmt.name}: zeros give non-finite gradients")


def _check_magnitudes(fmt: Format, seed: int) -> None:
    """The largest and smallest finite weights, and knobs at both ends, give finite weights."""
    for dtype, w in _extreme_weights(seed):
        groups = fmt.group.scale_shape(w.shape)
        for knob in (None, 0.0, 0.5, 16.0):
            knobs = None if knob is None else Knobs(torch.full(groups, knob), torch.full(groups, knob))
            seen = fmt.dequantize(fmt.quantize(w, knobs))
            what = f"{fmt.name}: {dtype} weights up to {float(w.abs().max()):.3g} with knobs {knob}"
            require(bool(torch.isfinite(seen).all()), f"{what} become non-finite")
            fake = fmt.fake_quantize(w, fmt.stats(w), knobs, None)
            require(torch.equal(fake, seen), f"{what}: fake_quantize differs")


def _extreme_weights(seed: int) -> Iterator[tuple[torch.dtype, Tensor]]:
    sign = torch.where(random_weight((4, 40), seed) < 0, -1.0, 1.0)
    sign[0], sign[1] = 1, -1
    for dtype in DTYPES:
        # A step may be rounded up by its dtype, hence no float32 beyond the largest bfloat16.
        largest = min(torch.finfo(dtype).max, torch.finfo(torch.bfloat16).max)
        smallest = torch.finfo(dtype).smallest_normal
        for size in (largest, smallest, smallest * torch.finfo(dtype).eps):
            yield dtype, (sign * size).to(dtype)
        mixed = torch.where(torch.arange(40) % 3 == 0, largest, smallest)
        yield dtype, (sign * mixed).to(dtype)


def _check_non_finite(fmt: Format, seed: int) -> None:
    """NaN and infinite weights are refused with their number, wherever they stand."""
    bands = (CHUNK // 64 + 5, 64)
    for shape, bad in (((4, 40), torch.nan), ((4, 40), torch.inf), ((4, 40), -torch.inf), (bands, torch.nan)):
        w = random_weight(shape, seed)
        w[0, 3] = w[1, 5] = w[-1, -1] = bad
        for use in (fmt.stats, fmt.quantize):
            require(f"3 of {w.numel()}" in _complaint(use, w), f"{fmt.name}: {bad} is not counted rightly")


def _complaint(use: Callable[[Tensor], object], w: Tensor) -> str:
    try:
        use(w)
    except NumericsError as error:
        return str(error)
    return ""


CHECKS: tuple[Callable[[Format, int], None], ...] = (
    _check_power_of_two,
    _check_rows,
    _check_parts_of_weights,
    _check_bands,
    _check_zeros,
    _check_magnitudes,
    _check_non_finite,
    check_two_level,
    check_steps_are_nearest,
)
"""Checks that choose their own weights; each takes the format and a seed."""
