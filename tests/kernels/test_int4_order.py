"""Packed int4 matrices: the compiled program, PyTorch's operations and its operator give the same bytes."""

from __future__ import annotations

import pytest
import torch

from auto_round import compiled
from auto_round.kernels import int4_order

needs_order = pytest.mark.skipif(int4_order.find_order() is None, reason="the order is not known")


@needs_order
@pytest.mark.parametrize("n_in", [32, 96, 160])
@pytest.mark.parametrize("threads", [1, 3])
def test_all_ways_give_the_same_bytes(monkeypatch, n_in, threads):
    order = int4_order.find_order()
    generator = torch.Generator().manual_seed(n_in)
    codes = torch.randint(0, 16, (3 * 64, n_in), dtype=torch.uint8, generator=generator)
    monkeypatch.setattr(compiled, "FEW", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        own = order.pack(codes)
        strided = order.pack(codes.t().contiguous().t())
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(int4_order, "_program", lambda: None)
    assert torch.equal(own, order.pack(codes))
    assert torch.equal(own, strided)
    assert torch.equal(own.view(-1), int4_order._pack(codes).view(torch.uint8).view(-1))
    assert torch.equal(order.unpack(own, n_in), codes)
