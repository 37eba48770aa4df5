"""Channels that can be rescaled are told from those that only seem so on one row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auto_round.models.links import find_links

WIDTH, TOKENS = 12, 8


class Plain(nn.Module):
    """A norm, and two matrices that read it beside a third that reads their product."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        read = self.norm(x)
        return self.down(self.gate(read).sigmoid() * self.made(self.up(self.view(read)))) + self.more(read)

    def view(self, read):
        return read

    def made(self, up):
        return up

    def more(self, read):
        return 0


class Viewed(Plain):
    """One reader has its tokens in another shape."""

    def view(self, read):
        return read.reshape(2, -1, WIDTH).reshape(-1, WIDTH)


class Clamped(Plain):
    """Values stay as they are up to 8, which none of these rows reaches."""

    def made(self, up):
        return up.clamp(-8, 8)


class Rarely(Plain):
    """Another reader, of the last token only."""

    def more(self, read):
        last = (torch.arange(TOKENS)[:, None] == TOKENS - 1).float()
        return last * (read * 3.0)


class Elsewhere(Plain):
    """Another matrix reads the norm, where there are images."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH, bias=False)

    def more(self, read):
        return self.other(read) if len(read) > TOKENS else 0


class Idle(Plain):
    """`down` reads nothing that changes what comes out."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        read = self.norm(x)
        best = (self.gate(read) + self.down(self.up(x))).topk(WIDTH).indices
        return torch.zeros_like(x).scatter(-1, best, 1.0) * x.sum() + self.other(read)


class HandsOn(Plain):
    """What `up` makes is handed on to a later block as well."""

    def made(self, up):
        self.up_made = up
        return up

    def forward(self, x):
        return super().forward(x), self.up_made.reshape(1, -1)


def _outputs(found):
    return found if isinstance(found, tuple) else (found,)


def links_of(kind):
    block = kind()
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        found = find_links(block, lambda: _outputs(block(x)), lambda _: True)
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    return {(*link.makers, *link.readers) for link in found}


NORM, PAIR = ("norm.weight", "gate.weight", "up.weight"), ("up.weight", "down.weight")


@pytest.mark.parametrize(
    ("kind", "links"),
    [
        (Plain, {NORM, PAIR}),
        (Viewed, {NORM, PAIR}),
        (HandsOn, {NORM}),
        (Clamped, {NORM}),
        (Rarely, {PAIR}),
        (Elsewhere, {PAIR}),
        (Idle, {("norm.weight", "gate.weight", "other.weight")}),
    ],
)
def test_links(kind, links):
    assert links_of(kind) == links
