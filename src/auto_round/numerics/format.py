"""Format: one numeric format, defined once; quantize, dequantize and fake-quantize follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import NumericsError
from auto_round.numerics.at_once import weights_at_once
from auto_round.numerics.grid import Grid
from auto_round.numerics.group import Group
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import Knobs, Scale, ScaleRule, Stats, stored_bits

CHUNK = 1 << 21
"""Weights handled at a time on a CPU outside of tuning. An eighth would fit a core's cache better, but two
threads would wait for each other's turn in Python: 2.0 against 1.7 ns a weight (docs/LOG.md)."""


@dataclass(frozen=True, slots=True)
class Format:
    """Grid x group x scale rule.

    Attributes:
        name: for example `int4_g128_sym`.
        grid: numbers that a code can stand for.
        group: weights that share a scale.
        rule: how the scale follows from a group.
    """

    name: str
    grid: Grid
    group: Group
    rule: ScaleRule

    @property
    def shares(self) -> bool:
        """Whether groups share a number, so that the range of one has a say in the scales of others."""
        return self.rule.alone is not self.rule

    def stats(self, w: Tensor) -> Stats:
        """Range of each group of `w` `[..., out, in]`, float32 `[..., rows, n_groups]`.

        Raises:
            NumericsError: `w` holds NaN or infinities.
        """
        groups = self.group.scale_shape(w.shape)
        lo, hi = (torch.empty(groups, dtype=torch.float32, device=w.device) for _ in range(2))
        for band, grouped in self._bands(w):
            # Two passes: on CPUs `aminmax` takes four times as long over rows as short as a group.
            torch.amin(grouped, -1, out=lo[band])
            torch.amax(grouped, -1, out=hi[band])
        if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
            bad = int((~torch.isfinite(w)).sum())
            raise NumericsError(f"{bad} of {w.numel()} weights are NaN or infinite")
        return Stats(lo.clamp_max_(0), hi.clamp_min_(0))

    def quantize(self, w: Tensor, knobs: Knobs | None = None, v: Tensor | None = None) -> QTensor:
        """Codes and scale of a weight: the one place where rounding is decided.

        Args:
            w: `[..., out, in]`, any float dtype; computed in float32.
            knobs: range multipliers; None for the measured range.
            v: rounding offset in units of the step, shape of `w`; None for none.

        Raises:
            NumericsError: `w` holds NaN or infinities.
        """
        with torch.no_grad():
            scale = self.rule.fit(self.stats(w), self.grid, knobs)
            codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
            for band, grouped in self._bands(w):
                offset = None if v is None else self.group.split(v[band])
                floor = None if scale.floor is None else scale.floor[band]
                zero = None if scale.zero is None else scale.zero[band]
                u = _in_steps(grouped, scale.step[band], floor, offset, out=grouped)
                n = self.group.join(self.grid.snap(u, _last(zero), out=u), codes[band].shape)
                self.grid.encode(n, out=codes[band])
            return QTensor(codes, scale, self)

    def _bands(self, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows of `w`, each with its weights `[rows, n_groups, width]` as float32.

        All bands of about `CHUNK` weights use the same memory; the caller may change it.
        """
        room: Tensor | None = None
        for band in self._row_bands(w):
            grouped = self.group.split(w[band])
            if room is None:
                room = torch.empty_like(grouped, dtype=torch.float32)
            yield band, room[: len(grouped)].copy_(grouped)

    def _row_bands(self, x: Tensor) -> Iterator[slice]:
        """Slices of rows of a matrix of about `CHUNK` numbers; one slice where groups span rows."""
        together = self.group.size == 0 or x.dim() != 2
        rows = max(1, len(x) if together else weights_at_once(x.device, CHUNK) // max(1, x.shape[1]))
        return (slice(start, start + rows) for start in range(0, len(x), rows))

    def dequantize(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weight `[..., out, in]` of codes and scale, computed in float32 and rounded once to `dtype`."""
        w: Tensor | None = None
        for band in self._row_bands(q.codes):
            n = self.grid.decode(self.group.split(q.codes[band]))
            part = self.group.join(_in_weights(n, q.scale, band), q.codes[band].shape).to(dtype)
            if len(part) == len(q.codes):
                return part
            if w is None:
                w = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
            w[band] = part
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
        scale = self.rule.fit(stats, self.grid, knobs)
        grouped = self.group.split(w).to(torch.float32)
        offset = None if v is None else self.group.split(v)
        out = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
            grouped, scale.step, scale.zero, scale.floor, offset, self.grid
        )
        return self.group.join(out, w.shape)

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """Stored bits per weight of a `shape` `[..., out, in]`: codes and all parts of the scales."""
        return self.grid.bits + stored_bits(self.rule, self.group.scale_shape(shape)) / math.prod(shape)


def _last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.unsqueeze(-1)


def _in_steps(
    w: Tensor, step: Tensor, floor: Tensor | None, v: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Weights `[..., n_groups, width]` above the floor in units of the step, plus the rounding offset."""
    above = w if floor is None else torch.add(w, floor.unsqueeze(-1), out=out)
    u = torch.div(above, step.unsqueeze(-1), out=out)
    return u if v is None else torch.add(u, v, out=out)


def _in_weights(n: Tensor, scale: Scale, band: slice) -> Tensor:
    """Grid numbers `[..., n_groups, width]` of some rows as weights, float32."""
    if scale.zero is not None:
        n = n - scale.zero[band].unsqueeze(-1)
    w = n * scale.step[band].unsqueeze(-1)
    return w if scale.floor is None else w - scale.floor[band].unsqueeze(-1)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize in one pass, with the gradient of the straight-through estimate.

    With `u = (w + floor) / step` and `n` the grid number after saturation, and `inside` marking weights that
    did not saturate: `d/dv = step * inside`, `d/dstep = (n - zero) - inside * u`,
    `d/dzero = -step * (1 - inside)`, `d/dfloor = inside - 1`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        step: Tensor,
        zero: Tensor | None,
        floor: Tensor | None,
        v: Tensor | None,
        grid: Grid,
    ) -> Tensor:
        u = _in_steps(w, step, floor, None)
        shifted = u if v is None else u + v
        n = grid.snap(shifted, _last(zero))
        if zero is not None:
            shifted = shifted + zero.unsqueeze(-1)
        # Half a step beyond the ends still rounds to the ends, so it has not saturated.
        inside = (shifted >= grid.lo - 0.5) & (shifted <= grid.hi + 0.5)
        if zero is not None:
            n = n - zero.unsqueeze(-1)
        out = n * step.unsqueeze(-1)
        if floor is not None:
            out.sub_(floor.unsqueeze(-1))
        ctx.save_for_backward(n.sub_(u.mul_(inside)), inside, step)
        return out

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        towards_step, inside, step = ctx.saved_tensors
        _, wants_step, wants_zero, wants_floor, wants_v, _ = ctx.needs_input_grad
        kept = grad * inside
        d_step = d_zero = d_floor = d_v = None
        if wants_step:
            d_step = (grad * towards_step).sum(-1)
        if wants_zero:
            d_zero = (kept - grad).sum(-1) * step
        if wants_floor:
            d_floor = (kept - grad).sum(-1)
        if wants_v:
            d_v = kept * step.unsqueeze(-1)
        return None, d_step, d_zero, d_floor, d_v, None
