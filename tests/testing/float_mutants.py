"""Floating formats, grids, layouts and kernels with one fault each, which a kit has to find.

Each fault is made the same way in both directions wherever that is possible: writing and reading agree, and
only an independent check sees it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from auto_round.kernels.reference import TorchKernel
from auto_round.layouts.compressed_float import FloatLayout
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.multiples import Multiples
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import Scale, legal_step
from auto_round.numerics.scale_float import BoundOverTensor, LargestToTop, OverTensor, larger_side
from auto_round.numerics.scale_power import PowerOfTwo
from auto_round.numerics.scale_two_level import SharedAffine, SharedSigned
from auto_round.numerics.ste import replace_ste


class Doubled(FloatGrid):
    """The bias of the exponent is off by one: every number is twice as large."""

    def snap(self, u, shift=None, out=None):
        n = super().snap(u / 2, shift) * 2
        return n if out is None else out.copy_(n)

    def encode(self, numbers, out=None):
        return super().encode(numbers / 2, out)

    def decode(self, codes):
        return super().decode(codes) * 2


class AwayFromZero(FloatGrid):
    """Ties go to the number farther from zero."""

    def snap(self, u, shift=None, out=None):
        spacing = self.spacing(u)
        steps = u / spacing
        tie = (steps - steps.trunc()).abs() == 0.5
        n = torch.where(tie, steps.trunc() + steps.sign(), steps.round()) * spacing
        n = n.clamp(self.lo, self.hi)
        return n if out is None else out.copy_(n)


class TowardsZero(FloatGrid):
    """Cuts off instead of rounding."""

    def snap(self, u, shift=None, out=None):
        spacing = self.spacing(u)
        n = ((u / spacing).trunc() * spacing).clamp(self.lo, self.hi)
        return n if out is None else out.copy_(n)


class SignLost(FloatGrid):
    """Codes have no sign."""

    def encode(self, numbers, out=None):
        return super().encode(numbers.abs(), out)


class HalvesSwapped(FloatGrid):
    """Low and high bits of a code change places when it is read."""

    def decode(self, codes):
        half = self.bits // 2
        low = codes & ((1 << half) - 1)
        return super().decode((codes >> half) | (low << (self.bits - half)))


def power_off_by(more: int) -> type[PowerOfTwo]:
    class OffBy(PowerOfTwo):
        def _exponent(self, size):
            return super()._exponent(size) + more

    return OffBy


class ReadOneMore(PowerOfTwo):
    """Reads the byte of a power as that of the next one."""

    def read(self, parts):
        scale = super().read(parts)
        return Scale(scale.step * 2, None, scale.parts)


class StepCutOff(LargestToTop):
    """Rounds the step to the bfloat16 below."""

    def fit(self, stats, grid, knobs=None):
        wanted = legal_step(larger_side(stats, knobs) / grid.hi, torch.float32)
        upper = (wanted.detach().view(torch.int32) & -0x10000).view(torch.float32)  # half of a float32
        step = replace_ste(wanted, upper.clamp_min(torch.finfo(self.dtype).smallest_normal))
        return Scale(step, None) if step.requires_grad else self.read({"step": step.to(self.dtype)})


class StepDoubled(LargestToTop):
    """The exponent of a step is off by one."""

    def fit(self, stats, grid, knobs=None):
        scale = super().fit(stats, grid, knobs)
        return self.read({"step": scale.parts["step"] * 2}) if scale.parts else scale


class StepsTransposed(LargestToTop):
    """Takes steps of blocks as if they were stored column by column."""

    def read(self, parts):
        step = parts["step"]
        turned = step.transpose(-1, -2).reshape(step.shape).to(torch.float32)
        return Scale(turned, None, parts)


class BlockCutOff(OverTensor):
    """Rounds the number of each group down."""

    def bind(self, stats, grid):
        return _CutOff(self, super().bind(stats, grid).shared)


class _CutOff(BoundOverTensor):
    def fit(self, stats, grid, knobs=None):
        blocks = self.rule.blocks
        wanted = larger_side(stats, knobs) / grid.hi * self.shared
        code = blocks.encode(blocks.snap(wanted.detach()).clamp_min(blocks.smallest)).int()
        code = (code - (blocks.decode(code) > wanted).int()).clamp_min(1).to(torch.uint8)
        b = replace_ste(wanted, blocks.decode(code))
        if b.requires_grad:
            return Scale(b / self.shared, None)
        return self.rule.read({"block": code, "tensor": self.shared})


class NoGlobal(OverTensor):
    """Forgets the number that all groups share when it reads."""

    def read(self, parts):
        return Scale(self.blocks.decode(parts["block"]), None, parts)


class SharedDoubled(SharedSigned):
    """Reads a number that groups share as twice as large."""

    def read(self, parts):
        scale = super().read(parts)
        return Scale(scale.step * 2, None, parts)


class SharedMissing(SharedAffine):
    """Reads multiples without the number that they are multiples of."""

    def read(self, parts):
        ones = torch.ones_like(parts["d"])
        return Scale(super().read({**parts, "d": ones}).step, None, parts, super().read(parts).floor)


class MultiplesTurned(Multiples):
    """Takes the multiples of a block in the opposite order."""

    def read(self, shared, multiple):
        return super().read(shared, multiple.flip(-1))


class MultiplesCutOff(Multiples):
    """Rounds multiples down."""

    def divide(self, x, shared):
        half = 0.49 * shared.abs().repeat_interleave(self.per, -1)[..., : x.shape[-1]]
        return super().divide(x - x.sign() * half, shared)


@dataclass(frozen=True)
class FaultyLayout:
    """A layout that changes bytes after packing, and back before unpacking."""

    inner: FloatLayout
    part: str
    change: object
    back: object

    @property
    def name(self):
        return self.inner.name

    def accepts(self, fmt, shape):
        return self.inner.accepts(fmt, shape)

    def spec(self, fmt, shape):
        return self.inner.spec(fmt, shape)

    def pack(self, q):
        return self._with(self.inner.pack(q), self.change)

    def unpack(self, parts, fmt, shape):
        return self.inner.unpack(self._with(parts, self.back), fmt, shape)

    def _with(self, parts, change):
        part = parts[self.part]
        octets = part.contiguous().view(torch.uint8) if part.element_size() == 1 else part
        changed = change(octets).contiguous()
        return {**parts, self.part: changed if changed.dtype == part.dtype else changed.view(part.dtype)}


def nibbles_swapped(octets):
    return (octets >> 4) | (octets << 4)


def signs_swapped(octets):
    """The sign of each of the two codes stands for that of the other kind."""
    return octets ^ 0x88


@dataclass(frozen=True)
class FaultyKernel(TorchKernel):
    """The reference kernel, given a weight with a fault; what it restores is right."""

    fault: object = None
    name: str = "faulty"

    def prepare(self, q, spec):
        return super().prepare(self.fault(q), spec)

    def restore(self, buffers, spec):
        return super().restore(buffers, spec)


def with_codes(change):
    return lambda q: QTensor(change(q.codes), q.scale, q.format)


def with_part(name, change):
    def fault(q):
        parts = {**q.scale.parts, name: change(q.scale.parts[name])}
        return QTensor(q.codes, q.format.rule.read(parts), q.format)

    return fault


def neighbours_swapped(codes):
    return codes.view(*codes.shape[:-1], -1, 2).flip(-1).flatten(-2)


def with_rule(fmt: Format, kind: type, **fields) -> Format:
    """The format with a rule of another kind, with the fields of its own."""
    own = {f.name: getattr(fmt.rule, f.name) for f in dataclasses.fields(fmt.rule)}
    return dataclasses.replace(fmt, rule=kind(**{**own, **fields}))


def with_grid(fmt: Format, kind: type) -> Format:
    return dataclasses.replace(fmt, grid=of(kind, fmt.grid))


def of(kind: type, grid: FloatGrid) -> FloatGrid:
    return kind(grid.exponent_bits, grid.mantissa_bits, grid.top)
