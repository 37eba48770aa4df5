"""Conformance kit for formats whose groups share numbers: part of `check_format`.

Blocks are found by counting, scales are put together one by one, and what is stored is compared with what a
block needs: sharing must neither lose range nor reach across blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.numerics.format import Format
from auto_round.numerics.multiples import Multiples
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale_two_level import SharedAffine, SharedSigned
from auto_round.testing.failure import require

EPS = 2.0**-10
"""Distance of neighbouring float16 numbers near 1."""

Shared = tuple[str, str, Multiples]
"""Name of the shared number, name of the multiples, and how they are shared."""


def shared_parts(fmt: Format) -> tuple[Shared, ...]:
    """What groups of a format share; nothing for formats with one level."""
    if isinstance(fmt.rule, SharedSigned):
        return (("d", "sc", fmt.rule.steps),)
    if isinstance(fmt.rule, SharedAffine):
        return (("d", "sc", fmt.rule.steps), ("dmin", "mn", fmt.rule.floors))
    return ()


def by_hand(q: QTensor, shared: Shared) -> Tensor:
    """Product of shared number and multiple of each group, `[rows, n_groups]` float32, one by one."""
    number, multiple, how = shared
    table = q.scale.parts[multiple]
    rows, n_groups = table.shape
    d = q.scale.parts[number].to(torch.float32)
    products = [
        [d[r, g // how.per] * table[r, g].to(torch.float32) for g in range(n_groups)] for r in range(rows)
    ]
    return torch.stack([torch.stack(row) for row in products])


def step_error(fmt: Format, q: QTensor) -> Tensor:
    """How far rounding to a multiple may move a step, `[..., n_groups]` float32; 0 with one level."""
    return _halves(fmt, q, 0, q.scale.step)


def floor_error(fmt: Format, q: QTensor) -> Tensor:
    """The same for a floor."""
    return _halves(fmt, q, 1, q.scale.step)


def _halves(fmt: Format, q: QTensor, which: int, like: Tensor) -> Tensor:
    shared = shared_parts(fmt)
    if which >= len(shared):
        return torch.zeros_like(like)
    number, _, how = shared[which]
    half = q.scale.parts[number].to(torch.float32).abs() / 2
    return half.repeat_interleave(how.per, -1)[..., : like.shape[-1]]


def check_two_level(fmt: Format, seed: int) -> None:
    """Check what a format promises about numbers that groups share.

    Raises:
        ConformanceError: a promise is broken.
    """
    shared = shared_parts(fmt)
    if not shared:
        return
    _check_products(fmt, shared, seed)
    _check_resolution(fmt, shared, seed)
    _check_blocks_are_apart(fmt, shared, seed)


def _weight(fmt: Format, n_blocks: float, per: int, seed: int) -> Tensor:
    """Three rows of groups of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    n_groups = int(n_blocks * per)
    w = torch.randn(3, n_groups, fmt.group.size, generator=generator)
    w = w * (0.3 + 8 * torch.rand(3, n_groups, 1, generator=generator))
    return w.reshape(3, -1)


def _check_products(fmt: Format, shared: tuple[Shared, ...], seed: int) -> None:
    """Scales are products of the parts of the group's own block, and weights follow from them alone."""
    q = fmt.quantize(_weight(fmt, 2.5, shared[0][2].per, seed))
    step = by_hand(q, shared[0])
    require(
        torch.equal(q.scale.step, step), f"{fmt.name}: a step is not its block's number times its multiple"
    )
    n = fmt.grid.decode(q.codes)
    value = n * step.repeat_interleave(fmt.group.size, -1)
    if len(shared) > 1:
        floor = by_hand(q, shared[1])
        value = value - floor.repeat_interleave(fmt.group.size, -1)
    require(torch.equal(fmt.dequantize(q), value), f"{fmt.name}: weights are not put together as stored")


def _check_resolution(fmt: Format, shared: tuple[Shared, ...], seed: int) -> None:
    """The largest number of a block has the outermost multiple, and the others their nearest one."""
    w = _weight(fmt, 2.0, shared[0][2].per, seed)
    stats, q = fmt.stats(w), fmt.quantize(w)
    if not isinstance(fmt.rule, SharedSigned | SharedAffine):
        raise TypeError(f"{fmt.name}: groups share nothing")
    alone = fmt.rule.alone.fit(stats, fmt.grid)
    wanted = (alone.step, alone.floor)
    for (number, multiple, how), ideal in zip(shared, wanted, strict=False):
        table = q.scale.parts[multiple].float().reshape(3, -1, how.per)
        outermost = table.gather(-1, table.abs().argmax(-1, keepdim=True))
        where = f"{fmt.name}: {multiple}"
        require(bool((outermost == how.anchor).all()), f"{where} does not use its range")
        if ideal is None:
            raise AssertionError(f"{fmt.name}: {number} belongs to nothing")
        d = q.scale.parts[number].float().unsqueeze(-1)
        ratio = ideal.reshape(3, -1, how.per) / d
        near = (table - ratio).abs() <= 0.5 + EPS * ratio.abs()
        lifted = (ratio.abs() < 1) & (table.abs() == 1)
        require(bool((near | lifted).all()), f"{where} is not the nearest multiple")
        require(bool(((table >= how.least) & (table <= how.most)).all()), f"{where} leaves its range")
        zero_allowed = how.least == 0
        require(zero_allowed or bool((table != 0).all()), f"{where} of 0 makes weights alike")


def _check_blocks_are_apart(fmt: Format, shared: tuple[Shared, ...], seed: int) -> None:
    """What is in one block changes nothing in the next."""
    per = shared[0][2].per
    width = per * fmt.group.size
    w = _weight(fmt, 3.0, per, seed)
    q = fmt.quantize(w)
    other = w.clone()
    other[:, width : 2 * width] *= -5
    moved = fmt.quantize(other)
    for block in (0, 2):
        at = slice(block * width, (block + 1) * width)
        same = torch.equal(q.codes[:, at], moved.codes[:, at])
        for number, multiple, how in shared:
            groups = slice(block * how.per, (block + 1) * how.per)
            same &= torch.equal(
                q.scale.parts[multiple][:, groups], moved.scale.parts[multiple][:, groups]
            ) and torch.equal(q.scale.parts[number][:, block], moved.scale.parts[number][:, block])
        require(same, f"{fmt.name}: a block depends on its neighbour")
