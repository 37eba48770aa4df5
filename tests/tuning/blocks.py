"""Small blocks and data to tune them on."""

from __future__ import annotations

import torch
from torch import nn

from auto_round.numerics.presets import int_format
from auto_round.tuning.samples import Samples, run_block
from auto_round.tuning.weights import WeightTask

HIDDEN, LENGTH = 32, 8
W2 = int_format(2, 16, sym=True)


class Mlp(nn.Module):
    """Two layers and a norm around them, with a residual."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 64)
        self.down = nn.Linear(64, HIDDEN, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(noise * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1 * noise)
            self.norm.weight.add_(1)
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class Experts(nn.Module):
    """Two experts; tokens go to the first where their first number is not above the threshold."""

    def __init__(self, threshold=1e9):
        super().__init__()
        self.first, self.second = Mlp(seed=1), Mlp(seed=2)
        self.threshold = threshold
        self.requires_grad_(False)

    def forward(self, x):
        if not bool((x[..., 0] > self.threshold).any()):
            return (self.first(x),)
        to_second = (x[..., :1] > self.threshold).float()
        return ((1 - to_second) * self.first(x) + to_second * self.second(x),)


def activations(n, seed, dtype=torch.float32):
    """Hidden states `[n, length, hidden]` with channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, LENGTH, HIDDEN, generator=generator)
    return (x * torch.linspace(0.2, 2.0, HIDDEN)).to(dtype)


def samples(block, n=32, seed=1, masks=None):
    """Random inputs with the block's own outputs as targets."""
    inputs = activations(n, seed, next(block.parameters()).dtype)
    targets = torch.empty_like(inputs)
    run_block(block, Samples((inputs,), (inputs,)), (targets,), batch_size=8)
    return Samples((inputs,), (targets,), weights=None if masks is None else (masks.float(),))


def tasks(block, fmt=W2):
    """Every matrix of a block in one format."""
    return {name: WeightTask(fmt) for name, p in block.named_parameters() if p.dim() == 2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
