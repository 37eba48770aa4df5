"""Format: one numeric format, defined once; quantize, dequantize and fake-quantize follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import NumericsError
from auto_round.numerics.grid import Grid
from auto_round.numerics.group import Group
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import Knobs, Scale, ScaleRule, Stats, stored_bits

CHUNK = 1 << 18
"""Weights handled at a time outside of tuning: temporaries of 1 MiB stay in a core's cache."""


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

    def stats(self, w: Tensor) -> Stats:
        """Range of each group of `w` `[..., out, in]`, float32 `[..., rows, n_groups]`.

        Raises:
            NumericsError: `w` holds NaN or infinities.
        """
        lo, hi = torch.aminmax(self.group.split(w), dim=-1)
        if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
            raise _non_finite(w)
        return Stats(lo.float().clamp_max(0), hi.float().clamp_min(0))

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
            try:
                return _by_rows(self._quantize, self, w, knobs, v)
            except NumericsError:  # counted in one band of rows only
                raise _non_finite(w) from None

    def _quantize(self, w: Tensor, knobs: Knobs | None, v: Tensor | None) -> QTensor:
        scale = self.rule.fit(self.stats(w), self.grid, knobs)
        grouped = self.group.split(w).to(torch.float32)
        offset = None if v is None else self.group.split(v)
        codes = self.grid.encode(_in_steps(grouped, scale.step, scale.floor, offset), _last(scale.zero))
        return QTensor(self.group.join(codes, w.shape), scale, self)

    def dequantize(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weight `[..., out, in]` of codes and scale, computed in float32 and rounded once to `dtype`."""
        n = self.grid.decode(self.group.split(q.codes))
        return self.group.join(_in_weights(n, q.scale), q.shape).to(dtype)

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


def _non_finite(w: Tensor) -> NumericsError:
    bad = int((~torch.isfinite(w)).sum())
    return NumericsError(f"{bad} of {w.numel()} weights are NaN or infinite")


def _last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.unsqueeze(-1)


def _in_steps(w: Tensor, step: Tensor, floor: Tensor | None, v: Tensor | None) -> Tensor:
    """Weights `[..., n_groups, width]` above the floor in units of the step, plus the rounding offset."""
    u = (w if floor is None else w + floor.unsqueeze(-1)) / step.unsqueeze(-1)
    return u if v is None else u + v


def _in_weights(n: Tensor, scale: Scale) -> Tensor:
    """Grid numbers `[..., n_groups, width]` as weights, float32."""
    if scale.zero is not None:
        n = n - scale.zero.unsqueeze(-1)
    w = n * scale.step.unsqueeze(-1)
    return w if scale.floor is None else w - scale.floor.unsqueeze(-1)


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


def _by_rows(
    work: Callable[[Tensor, Knobs | None, Tensor | None], QTensor],
    fmt: Format,
    w: Tensor,
    knobs: Knobs | None,
    v: Tensor | None,
) -> QTensor:
    """Do `work` on bands of rows and join the results; rows never share a scale unless the tensor does."""
    rows = max(1, CHUNK // max(1, w.shape[-1]))
    if fmt.group.size == 0 or w.dim() != 2 or w.shape[0] <= rows:
        return work(w, knobs, v)
    bands = []
    for start in range(0, w.shape[0], rows):
        band = slice(start, start + rows)
        part = None if knobs is None else Knobs(knobs.lo[band], knobs.hi[band])
        bands.append(work(w[band], part, None if v is None else v[band]))
    parts = {k: torch.cat([b.scale.parts[k] for b in bands]) for k in bands[0].scale.parts}
    return QTensor(torch.cat([b.codes for b in bands]), fmt.rule.read(parts), fmt)
