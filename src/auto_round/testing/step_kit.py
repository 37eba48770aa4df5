"""Conformance kit for rounded steps: part of `check_format`.

A step is stored in fewer bits than it is computed in. Rounding it down shrinks every range a little, which a
bound on errors of weights allows. So weights are made whose steps are known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.numerics.format import Format
from auto_round.numerics.scale_power import PowerOfTwo
from auto_round.testing.failure import require
from auto_round.testing.grid_kit import ladder
from auto_round.testing.two_level_kit import shared_parts

A_LITTLE = 1 - 2.0**-14
"""Factor that moves a step by less than half the distance of neighbouring numbers in 16 bits or fewer."""
NARROW = 2
"""Bytes of a stored number that rounds visibly."""


def check_steps_are_nearest(fmt: Format, seed: int) -> None:
    """Steps that lie just below a stored number are rounded up to it.

    Weights are numbers of the grid, both ends in each group, times a power of two, so that their steps are
    known and stored exactly. Then all groups but the first shrink a little; the first one may decide a number
    that all groups share.

    Powers of two are chosen, not rounded, and numbers that blocks share have a kit of their own.

    Raises:
        ConformanceError: a step is rounded down.
    """
    if isinstance(fmt.rule, PowerOfTwo) or shared_parts(fmt):
        return
    exact = _on_the_grid(fmt, (3 * fmt.group.rows, 96))
    known = fmt.quantize(exact).scale
    if not any(_rounds(name, part, known.step) for name, part in known.parts.items()):
        return
    if "zero" in known.parts and fmt.group.rows * fmt.group.width(exact.shape[1]) == 1:
        return  # one weight has one end of the two: its step is no power of two
    groups = torch.ones_like(known.step)
    shrunk = torch.full_like(groups, A_LITTLE)
    if groups.numel() > 1:
        shrunk[0, 0] = 1
    found = fmt.quantize(exact * fmt.group.spread(shrunk, exact.shape)).scale
    require(torch.equal(found.step, known.step), f"{fmt.name}: a step is rounded down")


def _rounds(name: str, part: Tensor, step: Tensor) -> bool:
    """Whether a stored part is a rounded step of each group; whole zero points are not."""
    narrow = part.dtype.itemsize <= NARROW and part.shape == step.shape
    return narrow and (part.is_floating_point() or name != "zero")


def _on_the_grid(fmt: Format, shape: tuple[int, int]) -> Tensor:
    """Numbers of the grid, around a middle one where there are zero points, in groups of several sizes."""
    numbers = ladder(fmt.grid)
    if fmt.grid.lo >= 0:
        numbers = numbers - numbers[len(numbers) // 2]
    ends = torch.stack([numbers[0], numbers[-1]])
    width = fmt.group.width(shape[1])
    columns = torch.arange(shape[1]) % width
    row = torch.where(columns < len(ends), ends[columns.clamp_max(1)], numbers[columns % len(numbers)])
    sizes = 2.0 ** -(torch.arange(fmt.group.scale_shape(shape)[-1] * shape[0]) % 3).float()
    if fmt.group.size == 0:
        return row.expand(shape)
    each = sizes.reshape(shape[0], -1)[:: fmt.group.rows]
    return row * fmt.group.spread(each, shape)
