"""Attention for tuning gives what PyTorch's gives, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from auto_round.models.causal_attention import (
    BANDS,
    NAME,
    QUERIES,
    _attend,
    causal_attention,
    install,
)


@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (4, 2), (6, 6)])
@pytest.mark.parametrize("length", [BANDS, 8 * BANDS, 2 * QUERIES])
@pytest.mark.parametrize("v_width", [16, 8, 24])
def test_output_and_gradients_equal_pytorchs(heads: int, shared: int, length: int, v_width: int) -> None:
    generator = torch.Generator().manual_seed(heads + length)
    kv = heads // shared
    shapes = [(2, heads, length, 16), (2, kv, length, 16), (2, kv, length, v_width)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    ours = causal_attention(*inputs, scale=0.3)
    theirs = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(*inputs, scale=0.3), theirs, rtol=1e-10, atol=1e-12)
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((theirs * weights).sum(), inputs)
    for got, wanted in zip(torch.autograd.grad((ours * weights).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [16, 21, QUERIES, QUERIES + 1, 3 * QUERIES - 1])
def test_without_gradients_any_length_will_do(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 8)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(q, k, v, 0.3), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradients", [True, False])
def test_later_positions_have_no_influence(gradients: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 2 * BANDS, 8, generator=generator) for _ in range(3))
    with torch.set_grad_enabled(gradients):
        before = causal_attention(q, k, v, 0.5)
        k[:, :, -1], v[:, :, -1] = 7.0, -7.0
        assert torch.equal(before[:, :, :-1], causal_attention(q, k, v, 0.5)[:, :, :-1])


@pytest.mark.parametrize("rows", [1, 5, 6])
def test_rows_in_parts_give_what_they_give_alone(rows: int) -> None:
    """Scores of one row fill what is formed at a time, so rows go one after another."""
    length = 5 * QUERIES
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(rows, 1, length, 4, generator=generator) for _ in range(3))
    with torch.no_grad():
        whole = causal_attention(q, k, v, 0.5)
        alone = [causal_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 0.5) for i in range(rows)]
    torch.testing.assert_close(whole, torch.cat(alone))


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(1, 4, 32, 24), (1, 4, 32, 24), (1, 4, 32, 16)], {}),
        ([(1, 4, 32, 24), (1, 2, 32, 24), (1, 2, 32, 8)], {"scaling": 0.5}),
        ([(2, 4, 6, 8), (2, 4, 6, 8), (2, 4, 6, 8)], {}),
        ([(1, 4, 8, 8), (1, 4, 12, 8), (1, 4, 12, 8)], {"is_causal": False}),
        ([(2, 4, 8, 8)] * 3, {"position_bias": torch.linspace(-1, 1, 64).double().view(1, 1, 8, 8)}),
    ],
)
def test_what_is_not_served_here_goes_to_transformers(shapes, options) -> None:
    """Narrow values, odd lengths, longer keys, biases: the same numbers and gradients as without us."""
    module = torch.nn.Module()
    module.num_key_value_groups = shapes[0][1] // shapes[1][1]
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    (ours, _), (theirs, _) = (f(module, q, k, v, None, **options) for f in (_attend, sdpa_attention_forward))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs)]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("family", "name"), [("llama", NAME), ("deepseek_v32", "sdpa")])
def test_models_that_ask_for_a_name_keep_it(family: str, name: str) -> None:
    """Sparse attention masks its scores only under the names that it knows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 128}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    install(model)
    assert model.config._attn_implementation == name
