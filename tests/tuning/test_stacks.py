"""Large stacks of matrices are rounded one matrix after the other: the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auto_round.numerics.presets import int_format
from auto_round.numerics.presets_float import nv_format
from auto_round.numerics.search import QUICK
from auto_round.tuning import weights
from auto_round.tuning.weights import Weight, WeightTask

FORMATS = {
    "int2": int_format(2, 32, sym=True),
    "asym": int_format(4, -1, sym=False),
    "a number for each matrix": nv_format(),
}


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("effort", [None, QUICK], ids=["plain", "searched"])
def test_one_after_the_other_is_all_at_once(monkeypatch, name, effort):
    found = []
    for at_once in (10**9, 1):
        monkeypatch.setattr(weights, "AT_ONCE", at_once)
        weight = Weight.of(Stack(), "experts", WeightTask(FORMATS[name]), effort)
        trained = [weight.v.uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(1)), *knobs(weight)]
        for each in trained:
            each.requires_grad_(True)
        made = weight.fake()
        made.backward(torch.randn(made.shape, generator=torch.Generator().manual_seed(2)))
        found.append([made.detach(), *(each.grad for each in trained)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    q = weight.quantize()
    assert torch.equal(q.format.dequantize(q, weight.dtype), found[1][0])


def knobs(weight):
    return weight.knobs.lo, weight.knobs.hi
