"""Steps (or floors) of a block of groups stored as one float16 number times a small whole number each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.scale import PartSpec, legal_step
from auto_round.numerics.ste import clamp_ste, round_ste


def gather(x: Tensor, per: int) -> Tensor:
    """Numbers of the groups of each block: `[..., n_groups]` -> `[..., n_blocks, per]`, filled with 0."""
    missing = -x.shape[-1] % per
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.reshape(*x.shape[:-1], -1, per)


def join(blocks: Tensor, n_groups: int) -> Tensor:
    """Inverse of `gather`: `[..., n_blocks, per]` -> `[..., n_groups]`."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :n_groups]


@dataclass(frozen=True, slots=True)
class Multiples:
    """How the groups of a block share one float16 number: a group's value is `shared * multiple`.

    Attributes:
        bits: width of a multiple.
        per: groups in a block.
        least: smallest multiple; a negative one makes multiples signed, and they are never 0.
    """

    bits: int
    per: int
    least: int

    @property
    def signed(self) -> bool:
        """Whether multiples may be negative."""
        return self.least < 0

    @property
    def anchor(self) -> int:
        """The multiple that the largest number of a block has: the end of the range farthest from 0."""
        return self.least if self.signed else (1 << self.bits) - 1

    @property
    def most(self) -> int:
        """Largest multiple."""
        return self.least + (1 << self.bits) - 1 if self.signed else self.anchor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of multiples in memory."""
        return torch.int8 if self.signed else torch.uint8

    def share(self, x: Tensor) -> Tensor:
        """Shared number of each block, `[..., n_blocks]`: `x / anchor` for its `x` of largest magnitude."""
        blocks = gather(x, self.per)
        largest = blocks.amax(-1)
        if self.signed:
            largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return legal_step(largest / self.anchor, torch.float16)

    def divide(self, x: Tensor, shared: Tensor) -> Tensor:
        """Multiple of each group: `round(x / shared)` in its range, float32, straight-through gradient.

        Signed multiples are never 0, which would make all weights of a group 0. Where that is best, the
        multiple 1 gives it too: weights are rounded to the nearest number.
        """
        ratio = join(gather(x, self.per) / shared.unsqueeze(-1), x.shape[-1])
        multiple = clamp_ste(round_ste(ratio), self.least, self.most)
        if self.signed:
            multiple = multiple + (multiple == 0)
        return multiple

    def value(self, shared: Tensor, multiple: Tensor) -> Tensor:
        """Numbers `[..., n_groups]` of shared numbers `[..., n_blocks]` and multiples, float32."""
        return join(gather(multiple, self.per) * shared.unsqueeze(-1), multiple.shape[-1])

    def stored(self, shared: str, multiple: str) -> dict[str, PartSpec]:
        """The shared number of each block and the multiple of each group, under these names."""
        return {
            shared: PartSpec(torch.float16, 16, span=(1, self.per)),
            multiple: PartSpec(self.dtype, self.bits),
        }

    def read(self, shared: Tensor, multiple: Tensor) -> Tensor:
        """Numbers `[..., n_groups]` float32 of stored parts."""
        return self.value(shared.to(torch.float32), multiple.to(torch.float32))
