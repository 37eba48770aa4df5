"""Attention for tuning gives what PyTorch's gives, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from auto_round.models.attention import BANDS, causal_attention


@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (4, 2), (6, 6)])
@pytest.mark.parametrize("length", [BANDS, 8 * BANDS])
def test_output_and_gradients_equal_pytorchs(heads: int, shared: int, length: int) -> None:
    generator = torch.Generator().manual_seed(heads + length)
    shapes = [(2, heads, length, 16), (2, heads // shared, length, 16), (2, heads // shared, length, 16)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    ours = causal_attention(*inputs, scale=0.3)
    theirs = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((theirs * weights).sum(), inputs)
    for got, wanted in zip(torch.autograd.grad((ours * weights).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_later_positions_have_no_influence() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 2 * BANDS, 8, generator=generator) for _ in range(3))
    before = causal_attention(q, k, v, 0.5)
    k[:, :, -1], v[:, :, -1] = 7.0, -7.0
    assert torch.equal(before[:, :, :-1], causal_attention(q, k, v, 0.5)[:, :, :-1])
