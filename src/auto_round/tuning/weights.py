"""Weights under tuning: the task of each weight, and its tuned parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from auto_round.errors import NumericsError
from auto_round.facts.tensor import MATRIX
from auto_round.models.matrix_experts import computes_in
from auto_round.numerics.descent import cancelling_offsets
from auto_round.numerics.format import Format
from auto_round.numerics.importance import AnyImportance
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.rule import Effort
from auto_round.numerics.scale import Knobs, Stats
from auto_round.numerics.search import search_knobs

AT_ONCE = 1 << 26
"""Weights of a stack up to which all of it is rounded at once. Rounding takes 16 bytes a weight for a while
beside what its gradient keeps: with 400 million weights of 128 experts 6 GB, by matrix 50 MB."""
MARGIN = 0.1
"""How far inside of what rounds to the same code an offset is left, in units of the grid's spacing
(docs/LOG.md)."""
MARGIN_STEPS = 5
"""It is moved there in so many steps, so that it lies at most one of them further inside."""


@dataclass(frozen=True, slots=True)
class WeightTask:
    """One weight to quantize.

    Attributes:
        format: numeric format; bound already where the weight shares numbers with others.
        original: the weight, where it is held more exactly than the block runs; None for the block's own.
        importance: second moments of the inputs, for the range search; None weighs all alike.
    """

    format: Format
    original: Tensor | None = None
    importance: AnyImportance | None = None


@dataclass(frozen=True, slots=True)
class Learned:
    """What tuning found for one weight, before it is rounded.

    Attributes:
        knobs: range multipliers.
        v: rounding offsets in units of the grid's spacing, shape of the weight, float32.
    """

    knobs: Knobs
    v: Tensor


@dataclass(slots=True)
class Weight:
    """One weight under tuning.

    Attributes:
        format: numeric format, bound to this weight.
        original: the weight as the model has it.
        stats: its measured ranges.
        knobs: range multipliers, tuned.
        v: rounding offsets in units of the grid's spacing, tuned; shape of `original`, float32.
        dtype: dtype in which the block runs.
        importance: second moments of the inputs, where they are known.
    """

    format: Format
    original: Tensor
    stats: Stats
    knobs: Knobs
    v: Tensor
    dtype: torch.dtype
    importance: AnyImportance | None = None

    @classmethod
    def of(cls, block: nn.Module, name: str, task: WeightTask, effort: Effort | None) -> Weight:
        """The starting point: no offset, and the measured range or (with `effort`) the searched one.

        Raises:
            NumericsError: the weight is not finite.
        """
        original = block.get_parameter(name).detach() if task.original is None else task.original
        stats = measured(name, task.format, original)
        fmt = task.format.bind(stats)
        v = None
        if effort is None:
            knobs = Knobs(torch.ones_like(stats.lo), torch.ones_like(stats.hi))
        else:
            knobs = search_knobs(fmt, original, task.importance, effort)
            v = cancelling_offsets(fmt, original, knobs, task.importance, effort.sweeps)
        if v is None:
            v = torch.zeros_like(original, dtype=torch.float32)
        return cls(fmt, original, stats, knobs, v, computes_in(block, name), task.importance)

    def fake(self, *, hold: bool = False) -> Tensor:
        """The weight as it would come back from its codes, in the dtype that the block runs in.

        Args:
            hold: gradients of the ranges are those of the same codes in other ranges. Else they are those of
                ranges that codes follow, which says how far to go in search of ranges, but not which way a
                model whose codes are found is better.
        """
        if self.original.dim() > MATRIX and self.original.numel() > AT_ONCE:
            return self._fake_by_matrix(hold)
        return self._fake(self.format, self.original, self.stats, Learned(self.knobs, self.v), hold)

    def _fake_by_matrix(self, hold: bool) -> Tensor:
        """The same, one matrix of a stack after the other: what rounding needs besides is that of one."""
        made = []
        # Unbound rather than indexed: the gradient of an index is a tensor of the whole stack's size.
        pieces = (self.original, self.v, self.knobs.lo, self.knobs.hi)
        for i, (_, v, lo, hi) in enumerate(zip(*(piece.unbind() for piece in pieces), strict=True)):
            made.append(self.fake_matrix(i, Learned(Knobs(lo, hi), v), hold=hold))
        return torch.stack(made)

    def fake_matrix(self, i: int, learned: Learned, *, hold: bool = False) -> Tensor:
        """One matrix of a stack as it would come back from its codes, with these offsets and multipliers."""
        return self._fake(self.format.matrix(i), self.original[i], self.stats[i], learned, hold)

    def _fake(self, fmt: Format, w: Tensor, stats: Stats, learned: Learned, hold: bool) -> Tensor:
        scale = fmt.rule_for(stats).fit(stats, fmt.grid, learned.knobs)
        return fmt.rounded(w, scale, learned.v, self.dtype, hold=hold)

    def learned(self) -> Learned:
        """The offsets and knobs as they are now, offsets a little inside of what rounds to the same codes.

        Sign descent leaves many weights at the very border between two numbers. The first steps of a later
        stage, small as they are, would throw these to either side.
        """
        knobs = Knobs(self.knobs.lo.detach(), self.knobs.hi.detach())
        with torch.no_grad():
            inside = self.v.detach().clone()
            if self.original.dim() == MATRIX:
                _move_inside(self.format, self.original, self.stats, Learned(knobs, inside))
            else:
                for i, v in enumerate(inside):
                    own = Learned(Knobs(knobs.lo[i], knobs.hi[i]), v)
                    _move_inside(self.format.matrix(i), self.original[i], self.stats[i], own)
        return Learned(knobs, inside)

    def cancelled(self, sweeps: int) -> Tensor | None:
        """Offsets under which errors cancel in the ranges as they are; see `cancelling_offsets`."""
        return cancelling_offsets(self.format, self.original, self.knobs, self.importance, sweeps)

    def cancel(self, sweeps: int) -> bool:
        """Take these offsets in place of the tuned ones, in their memory; none where products are not known.

        Returns:
            Whether products are known.
        """
        with torch.no_grad():
            known = cancelling_offsets(
                self.format, self.original, self.knobs, self.importance, sweeps, self.v.detach()
            )
            if known is None:
                self.v.zero_()
            return known is not None

    def quantize(self) -> QTensor:
        """Codes and scale of what was tuned."""
        with torch.no_grad():
            return self.format.quantize(self.original, self.knobs, self.v, self.stats)


@dataclass(slots=True)
class RescaledWeight:
    """One weight whose codes stay while its steps are learned.

    Attributes:
        format: numeric format, bound to this weight.
        codes: codes and scale of `knobs`.
        stats: measured ranges of the weight.
        knobs: range multipliers, which stay.
        ratio: what both of them are multiplied by, learned; `[..., rows, n_groups]` float32.
        dtype: dtype in which the block runs.
    """

    format: Format
    codes: QTensor
    stats: Stats
    knobs: Knobs
    ratio: Tensor
    dtype: torch.dtype

    def fake(self, *, hold: bool = True) -> Tensor:
        """The weight as it would come back from its codes, which stay, in the dtype of the block."""
        return self.format.fake_rescale(self.codes, self.stats, self._scaled()).to(self.dtype)

    def quantize(self) -> QTensor:
        """Codes and scale of what was learned."""
        with torch.no_grad():
            return self.format.rescale(self.codes, self.stats, self._scaled())

    def _scaled(self) -> Knobs:
        return Knobs(self.knobs.lo * self.ratio, self.knobs.hi * self.ratio)


def measured(name: str, fmt: Format, w: Tensor) -> Stats:
    """Ranges of a weight's groups; arguments as for `Format.stats`.

    Raises:
        NumericsError: the weight is not finite; names it.
    """
    try:
        return fmt.stats(w)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from None


def fake_weights(weights: Mapping[str, Weight | RescaledWeight], *, hold: bool = False) -> dict[str, Tensor]:
    """All weights of a block as they would come back from their codes; see `Weight.fake`."""
    return {name: weight.fake(hold=hold) for name, weight in weights.items()}


def _move_inside(fmt: Format, w: Tensor, stats: Stats, learned: Learned) -> None:
    """Move the offsets of a matrix inside of what rounds to the same codes, in place."""
    v = learned.v

    def codes(offsets: Tensor) -> Tensor:
        return fmt.quantize(w, learned.knobs, offsets, stats).codes

    here, moved = codes(v), torch.empty_like(v)
    for _ in range(MARGIN_STEPS):
        up, down = (codes(torch.add(v, way, out=moved)) != here for way in (MARGIN, -MARGIN))
        moved.copy_(down).sub_(up.to(moved.dtype)).mul_(MARGIN / MARGIN_STEPS).add_(v)
        torch.where(codes(moved) == here, moved, v, out=v)


def round_to_nearest(
    w: Tensor, fmt: Format, importance: AnyImportance | None = None, effort: Effort | None = None
) -> QTensor:
    """Quantize without tuning; with `effort`, in the range of smallest importance-weighted error.

    Where products of inputs are known, not every weight then gets the number nearest to it: see `descent`.
    """
    if effort is None:
        return fmt.quantize(w)
    fmt = fmt.bind(fmt.stats(w))
    knobs = search_knobs(fmt, w, importance, effort)
    return fmt.quantize(w, knobs, cancelling_offsets(fmt, w, knobs, importance, effort.sweeps))
