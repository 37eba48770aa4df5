"""Format: one numeric format, defined once; quantize, dequantize and fake-quantize follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import NumericsError
from auto_round.numerics.at_once import bands, weights_at_once
from auto_round.numerics.compiled_ranges import compiled_ranges
from auto_round.numerics.compiled_rounding import compiled_rounding
from auto_round.numerics.grid import Grid
from auto_round.numerics.group import Group
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.rule import BoundRule, ScaleRule, stored_bits
from auto_round.numerics.scale import Knobs, Scale, Stats

ZERO = "zero"
"""Stored part that has the zero points."""
CHUNK = 1 << 21
"""Weights handled at a time on a CPU outside of tuning. An eighth would fit a core's cache better, but two
threads would wait for each other's turn in Python: 2.0 against 1.7 ns a weight (docs/LOG.md)."""

TUNED_CHUNK = 1 << 18
"""The same while tuning, where one thread asks for all work."""


@dataclass(frozen=True, slots=True)
class Format:
    """Grid x group x scale rule.

    Attributes:
        name: for example `int4_g128_sym`.
        grid: numbers that a code can stand for.
        group: weights that share a scale.
        rule: how the scale follows from a group.
        bound: the rule when it knows the whole weight, see `bind`; no part of what the format is.
    """

    name: str
    grid: Grid
    group: Group
    rule: ScaleRule
    bound: BoundRule | None = field(default=None, compare=False, repr=False)

    def bind(self, *stats: Stats) -> Format:
        """This format for weights of these ranges, which are to share what is stored once a matrix.

        Needed only before a weight is cut, or where several weights share numbers: a format that is not bound
        binds itself to each weight that it quantizes.

        Args:
            stats: what `stats` gives for the whole weight, then for those that share numbers with it.
        """
        return self if self.bound is not None else replace(self, bound=self.rule.bind(stats, self.grid))

    @property
    def shared(self) -> tuple[str, ...]:
        """Stored parts of which a whole matrix has one number."""
        stored = self.rule.stored
        return tuple(n for n, part in stored.items() if self.group.size == 0 or part.span == (0, 0))

    @property
    def ties(self) -> bool:
        """Whether weights that are bound together share a number: the rule has one for a whole matrix."""
        return any(part.span == (0, 0) for part in self.rule.stored.values())

    def rule_for(self, stats: Stats) -> BoundRule:
        """The rule for a weight of these ranges."""
        return self.bound or self.rule.bind([stats], self.grid)

    def matrix(self, i: int) -> Format:
        """This format for one matrix of the stack `[n, out, in]` that it is bound to."""
        return self if self.bound is None else replace(self, bound=self.bound.matrix(i))

    def stats(self, w: Tensor) -> Stats:
        """Range of each group of `w` `[..., out, in]`, float32 `[..., rows, n_groups]`.

        Raises:
            NumericsError: `w` holds NaN or infinities.
        """
        lo, hi = compiled_ranges(self.group, w) or self._ranges(w)
        if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
            bad = int((~torch.isfinite(w)).sum())
            raise NumericsError(f"{bad} of {w.numel()} weights are NaN or infinite")
        return Stats(lo.clamp_max_(0), hi.clamp_min_(0))

    def _ranges(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of each group; zeros that fill up a short one count."""
        groups = self.group.scale_shape(w.shape)
        lo, hi = (torch.empty(groups, dtype=torch.float32, device=w.device) for _ in range(2))
        for _, scales, grouped in self._bands(w):
            # Two passes: on CPUs `aminmax` takes four times as long over rows as short as a group.
            torch.amin(grouped, -1, out=lo[scales])
            torch.amax(grouped, -1, out=hi[scales])
        return lo, hi

    def quantize(
        self, w: Tensor, knobs: Knobs | None = None, v: Tensor | None = None, stats: Stats | None = None
    ) -> QTensor:
        """Codes and scale of a weight: the one place where rounding is decided.

        Args:
            w: `[..., out, in]`, any float dtype; computed in float32.
            knobs: range multipliers; None for the measured range.
            v: rounding offset in units of the grid's spacing, shape of `w`; None for none.
            stats: `self.stats(w)`, where it is known.

        Raises:
            NumericsError: `w` holds NaN or infinities.
        """
        with torch.no_grad():
            stats = self.stats(w) if stats is None else stats
            scale = self.rule_for(stats).fit(stats, self.grid, knobs)
            compiled = compiled_rounding(self.grid, self.group, w, v, scale)
            if compiled is not None:
                return QTensor(compiled.codes(), scale, replace(self, bound=None))
            codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
            for rows, scales, grouped in self._bands(w):
                here = scale[scales]
                u = _in_steps(grouped, here.step, here.floor, out=grouped)
                if v is not None:
                    u = _shifted(u, self.group.split(v[rows]), self.grid.spacing(u), out=u)
                n = self.group.join(self.grid.snap(u, _last(here.zero), out=u), codes[rows].shape)
                self.grid.encode(n, out=codes[rows])
            return QTensor(codes, scale, replace(self, bound=None))

    def _bands(self, w: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows of `w`, rows of its scales, and these weights `[rows, n_groups, width]` as float32.

        All bands of about `CHUNK` weights use the same memory; the caller may change it.
        """
        room: Tensor | None = None
        for rows, scales in self.group.bands(w.shape, weights_at_once(w.device, CHUNK)):
            grouped = self.group.split(w[rows])
            if room is None:
                room = torch.empty_like(grouped, dtype=torch.float32)
            yield rows, scales, room[: len(grouped)].copy_(grouped)

    def dequantize(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weight `[..., out, in]` of codes and scale, computed in float32 and rounded once to `dtype`."""
        w: Tensor | None = None
        for rows, scales in self.group.bands(q.shape, weights_at_once(q.codes.device, CHUNK)):
            n = self.grid.decode(self.group.split(q.codes[rows]))
            part = self.group.join(_in_weights(n, q.scale[scales]), q.codes[rows].shape).to(dtype)
            if len(part) == len(q.codes):
                return part
            if w is None:
                w = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
            w[rows] = part
        return q.codes.to(dtype) if w is None else w

    def fake_quantize(self, w: Tensor, stats: Stats, knobs: Knobs | None, v: Tensor | None) -> Tensor:
        """`dequantize(quantize(w, knobs, v))`, bit for bit, with straight-through gradients in knobs and v.

        Args:
            w: `[..., out, in]`; no gradient flows to it.
            stats: `self.stats(w)`, computed once before tuning.
            knobs: range multipliers `[..., rows, n_groups]`.
            v: rounding offset, shape of `w`.

        Returns:
            float32 `[..., out, in]`.
        """
        return self.rounded(w, self.rule_for(stats).fit(stats, self.grid, knobs), v)

    def rounded(
        self,
        w: Tensor,
        scale: Scale,
        v: Tensor | None,
        dtype: torch.dtype = torch.float32,
        *,
        hold: bool = False,
    ) -> Tensor:
        """The same with a known scale.

        Args:
            w: as for `fake_quantize`.
            scale: of each group.
            v: as for `fake_quantize`.
            dtype: of the result, rounded to it once.
            hold: the gradient in the scale is that of the same codes and zero points under another scale
                (`fake_rescale`). Else it is that of a scale that codes follow.
        """
        compiled = compiled_rounding(self.grid, self.group, w, v, scale)
        if compiled is not None:
            return compiled.weights(dtype, hold=hold)
        grouped = self.group.split(w)
        offset = None if v is None else self.group.split(v)
        out = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
            grouped, scale.step, scale.zero, scale.floor, offset, _How(self.grid, hold)
        )
        return self.group.join(out, w.shape).to(dtype)

    def rounded_in(self, w: Tensor, scale: Scale, v: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The same in another dtype, without gradients."""
        with torch.no_grad():
            return self.rounded(w, scale, v, dtype)

    def rescale(self, q: QTensor, stats: Stats, knobs: Knobs) -> QTensor:
        """The same codes and zero points with the step that follows from other knobs.

        Args:
            q: of this format.
            stats: `self.stats(w)` of the weight.
            knobs: range multipliers.
        """
        parts = dict(self.rule_for(stats).fit(stats, self.grid, knobs).parts)
        kept = {name: part for name, part in q.scale.parts.items() if name == ZERO}
        return QTensor(q.codes, self.rule.read(parts | kept), replace(self, bound=None))

    def fake_rescale(self, q: QTensor, stats: Stats, knobs: Knobs) -> Tensor:
        """`dequantize(rescale(q, stats, knobs))`, bit for bit, differentiable in the knobs; float32."""
        scale = self.rule_for(stats).fit(stats, self.grid, knobs)
        n = self.grid.decode(self.group.split(q.codes))
        found = Scale(scale.step, q.scale.zero, floor=scale.floor)
        return self.group.join(_in_weights(n, found), q.shape)

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """Stored bits per weight of a `shape` `[..., out, in]`: codes and all parts of the scales."""
        return self.grid.bits + stored_bits(self.rule, self.group.scale_shape(shape)) / math.prod(shape)


def _last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.unsqueeze(-1)


def _in_steps(w: Tensor, step: Tensor, floor: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Weights `[..., n_groups, width]` above the floor in units of the step."""
    above = w if floor is None else torch.add(w, floor.unsqueeze(-1), out=out)
    return torch.div(above, step.unsqueeze(-1), out=out)


def _shifted(u: Tensor, v: Tensor, spacing: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`u + v * spacing`: weights moved by the rounding offset."""
    return torch.add(u, v, out=out) if spacing is None else torch.addcmul(u, v, spacing, out=out)


def _in_weights(n: Tensor, scale: Scale) -> Tensor:
    """Grid numbers `[..., n_groups, width]` as weights, float32."""
    if scale.zero is not None:
        n = n - scale.zero.unsqueeze(-1)
    w = n * scale.step.unsqueeze(-1)
    return w if scale.floor is None else w - scale.floor.unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class _How:
    """What `_FakeQuantize` knows beside tensors; see `Format.rounded`."""

    grid: Grid
    hold: bool


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize in one pass, with the gradient of the straight-through estimate.

    With `u = (w + floor) / step`, `gap` the grid's spacing there, `n` the grid number after saturation and
    `inside` marking weights that did not saturate: `d/dv = step * gap * inside`,
    `d/dstep = (n - zero) - inside * u`, `d/dzero = -step * (1 - inside)`, `d/dfloor = inside - 1`. Where
    codes are held, `d/dstep = n - zero`, `d/dzero = 0` and `d/dfloor = -1`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        step: Tensor,
        zero: Tensor | None,
        floor: Tensor | None,
        v: Tensor | None,
        how: _How,
    ) -> Tensor:
        grid = how.grid
        out, towards_step = (torch.empty_like(w, dtype=torch.float32) for _ in range(2))
        inside = torch.empty_like(w, dtype=torch.bool)
        gaps: Tensor | None = None
        scale = Scale(step, zero, floor=floor)
        for rows in _bands_of_groups(w):
            here = scale[rows]
            u = _in_steps(w[rows].to(torch.float32), here.step, here.floor)
            gap = None if v is None else grid.spacing(u)
            shifted = u if v is None else _shifted(u, v[rows], gap)
            n = grid.snap(shifted, _last(here.zero))
            if here.zero is not None:
                shifted = shifted + here.zero.unsqueeze(-1)
                n = n - here.zero.unsqueeze(-1)
            within = inside[rows].copy_(grid.saturated(shifted).logical_not_())
            torch.mul(n, here.step.unsqueeze(-1), out=out[rows])
            if here.floor is not None:
                out[rows].sub_(here.floor.unsqueeze(-1))
            torch.sub(n, 0 if how.hold else u.mul_(within), out=towards_step[rows])
            if gap is not None:
                gaps = torch.empty_like(out) if gaps is None else gaps
                gaps[rows] = gap
        ctx.save_for_backward(towards_step, inside, step, gaps)
        ctx.hold = how.hold
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        towards_step, inside, step, gaps = ctx.saved_tensors
        _, wants_step, wants_zero, wants_floor, wants_v, *_ = ctx.needs_input_grad
        wants_zero = wants_zero and not ctx.hold
        d_step = torch.empty_like(step) if wants_step else None
        outside = torch.empty_like(step) if wants_zero or wants_floor else None
        d_v = torch.empty_like(towards_step) if wants_v else None
        for rows in _bands_of_groups(grad):
            kept = grad[rows] * inside[rows]
            if d_step is not None:
                torch.sum(grad[rows] * towards_step[rows], -1, out=d_step[rows])
            if outside is not None:
                torch.sum(-grad[rows] if ctx.hold else kept - grad[rows], -1, out=outside[rows])
            if d_v is not None:
                torch.mul(kept, step[rows].unsqueeze(-1), out=d_v[rows])
                if gaps is not None:
                    d_v[rows].mul_(gaps[rows])
        d_zero = outside * step if wants_zero and outside is not None else None
        return None, d_step, d_zero, outside if wants_floor else None, d_v, None


def _bands_of_groups(grouped: Tensor) -> Iterator[slice]:
    """Rows of groups `[..., rows, n_groups, width]` to round at a time, along the first dimension.

    What rounding forms besides its results then takes little memory, and stays in a core's cache.
    """
    if torch.compiler.is_compiling():  # forms nothing besides
        return iter([slice(0, len(grouped))])
    return bands(len(grouped), math.prod(grouped.shape[1:]), weights_at_once(grouped.device, TUNED_CHUNK))
