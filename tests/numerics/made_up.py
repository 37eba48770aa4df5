"""A number type that the package does not have: one file, and `ROW` in the table of number types.

Four bits with a sign, whose spacing grows with the number, in groups of 16. A group's step is an 8-bit float
times a float32 number that is stored once for the whole weight, or for several weights that are tied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from auto_round.errors import Refusal
from auto_round.facts.tensor import TensorSpec
from auto_round.numerics.format import Format
from auto_round.numerics.group import Group
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import MAX_KNOB, Knobs, PartSpec, Scale, legal_step
from auto_round.numerics.search_groups import GroupRule
from auto_round.schemes.type_columns import CompressedWords, NumberType

NAME = "made_up"
EIGHT = torch.float8_e4m3fn
ROOM = 256.0
"""Step of the group with the largest weight, as a multiple of the shared number."""


@dataclass(frozen=True)
class Ladder:
    """Numbers on both sides of 0; a code is a sign bit and the number's place among `sizes`."""

    sizes: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    @property
    def bits(self):
        return len(self.sizes).bit_length()

    @property
    def lo(self):
        return -self.sizes[-1]

    @property
    def hi(self):
        return self.sizes[-1]

    @property
    def end_steps(self):
        return self.hi / (self.hi - self.sizes[-2])

    def spacing(self, u):
        gaps = [above - below for below, above in zip(self.sizes, self.sizes[1:], strict=False)]
        found = torch.full(u.shape, gaps[0])
        for size, gap in zip(self.sizes[1:-1], gaps[1:], strict=True):
            found = torch.where(u.abs() >= size, gap, found)
        return found

    def saturated(self, u):
        return u.abs() > self.hi + (self.hi - self.sizes[-2]) / 2

    def place(self, u):
        """Place of the nearest size, ties to the even one."""
        size, at = u.abs(), torch.zeros(u.shape)
        for i, (below, above) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            middle = (below + above) / 2
            at += (size >= middle) if i % 2 else (size > middle)
        return at.long()

    def snap(self, u, shift=None, out=None):
        assert shift is None
        n = torch.tensor(self.sizes)[self.place(u)] * torch.where(u < 0, -1.0, 1.0)
        return n if out is None else out.copy_(n)

    def encode(self, numbers, out=None):
        codes = (self.place(numbers) + (numbers < 0) * len(self.sizes)).to(torch.uint8)
        return codes if out is None else out.copy_(codes)

    def decode(self, codes):
        return torch.tensor([*self.sizes, *(-size for size in self.sizes)])[codes.long()]


@dataclass(frozen=True)
class SharedFloat:
    """`step = scale * shared`; `shared` is one number a weight."""

    tunable = True
    stored = {"scale": PartSpec(EIGHT, 8), "shared": PartSpec(torch.float32, 32, span=(0, 0))}  # noqa: RUF012

    def bind(self, stats, grid):
        largest = [torch.maximum(-s.lo, s.hi).amax((-2, -1), keepdim=True) for s in stats]
        shared = torch.stack(largest).amax(0) / (grid.hi * ROOM)
        return Bound(self, shared.clamp_min(torch.finfo(torch.float32).smallest_normal))

    def read(self, parts):
        return Scale(parts["scale"].float() * parts["shared"], None, parts)


@dataclass(frozen=True, eq=False)
class Bound(GroupRule):
    """The rule when the shared number is known: groups are independent."""

    rule: SharedFloat
    shared: torch.Tensor

    def matrix(self, i):
        return Bound(self.rule, self.shared[i])

    def fit(self, stats, grid, knobs=None):
        lo, hi = -stats.lo, stats.hi
        if knobs is not None:
            lo, hi = lo * knobs.lo, hi * knobs.hi
        scale = legal_step(torch.maximum(lo, hi) / (grid.hi * self.shared), EIGHT)
        if scale.requires_grad:
            return Scale(scale * self.shared, None)
        return self.rule.read({"scale": scale.to(EIGHT), "shared": self.shared})

    def starts(self, stats, grid, points):
        for size in torch.linspace(0.6, 1.5, points).tolist():
            yield Knobs(torch.full_like(stats.lo, size), torch.full_like(stats.hi, size))

    def moves(self, knobs, radius):
        for factor in (1 - radius, 1 + radius):
            yield Knobs(knobs.lo * factor, knobs.hi * factor)

    def refit(self, stats, grid, scale, moments):
        size = moments.nw / moments.nn.clamp_min(1e-30) * grid.hi
        ratio = (size / torch.maximum(-stats.lo, stats.hi).clamp_min(1e-30)).clamp(0, MAX_KNOB)
        return Knobs(ratio, ratio)


FORMAT = Format(NAME, Ladder(), Group(16), SharedFloat())


@dataclass(frozen=True)
class Nibbles:
    """Two codes a byte, the first in the lower half; scales as they are."""

    name: str = "nibbles"

    def accepts(self, fmt, shape):
        return None if fmt == FORMAT and shape[1] % 16 == 0 else Refusal(self.name, f"holds {NAME} only")

    def spec(self, fmt, shape):
        specs = {"codes": TensorSpec(torch.uint8, (shape[0], shape[1] // 2))}
        groups = fmt.group.scale_shape(shape)
        return specs | {n: TensorSpec(p.dtype, p.shape(groups)) for n, p in fmt.rule.stored.items()}

    def pack(self, q):
        return {"codes": q.codes[:, ::2] | q.codes[:, 1::2] << 4, **q.scale.parts}

    def unpack(self, parts, fmt, shape):
        codes = torch.stack([parts["codes"] & 15, parts["codes"] >> 4], -1).reshape(*shape)
        return QTensor(codes, fmt.rule.read({name: parts[name] for name in fmt.rule.stored}), fmt)


ROW = NumberType(
    called="made-up numbers of 4 bits",
    spellings={NAME: {}, "made_up4": {"bits": 4}},
    bits=(4,),
    group_sizes=(16,),
    weights=lambda scheme: FORMAT,
    stored=NAME,
    compressed=CompressedWords(type="float", format=lambda scheme: "nibbles", strategy="tensor_group"),
)
