"""Causal attention for tuning on a CPU: same result as PyTorch's, about twice as fast to differentiate.

PyTorch's own CPU kernel spends most of a tuning step in its backward pass. Here the probabilities are kept
from the forward pass, and queries are cut into bands so that half of the masked scores is never computed.
Registered under `NAME` through Transformers' public `AttentionInterface`; anything but plain causal
self-attention with gradients on a CPU goes to Transformers' own implementation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "auto_round_causal"
BANDS = 4


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T + causal mask) v.

    `q` is `[rows, repeats, length, width]` and scaled, `k` and `v` are `[rows, length, width]`: query heads
    that share a key head are stacked below each other, so that no key is copied and their gradients add up
    by themselves.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, repeats, length, width = q.shape
        size = length // BANDS
        blocked = torch.full((size, size), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        kept, outputs = [], []
        for start in range(0, length, size):
            end = start + size
            stacked = q[:, :, start:end].reshape(rows, repeats * size, width)
            scores = stacked @ k[:, :end].transpose(1, 2)
            scores.view(rows, repeats, size, end)[..., start:].add_(blocked)
            p = torch.softmax(scores, -1)
            outputs.append((p @ v[:, :end]).view(rows, repeats, size, width))
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return torch.cat(outputs, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        rows, repeats, length, width = q.shape
        size = length // BANDS
        dq, dk, dv = torch.empty_like(q), k, v
        for i in reversed(range(BANDS)):  # the last band reaches every key: it writes, the others add
            p, band, end = kept[i], slice(i * size, (i + 1) * size), (i + 1) * size
            g = grad[:, :, band].reshape(rows, repeats * size, width)
            stacked = q[:, :, band].reshape(rows, repeats * size, width)
            ds = torch._softmax_backward_data(g @ v[:, :end].transpose(1, 2), p, -1, p.dtype)
            dq[:, :, band] = (ds @ k[:, :end]).view(rows, repeats, size, width)
            to_keys, to_values = ds.transpose(1, 2) @ stacked, p.transpose(1, 2) @ g
            if end == length:
                dk, dv = to_keys, to_values
            else:
                dk[:, :end] += to_keys
                dv[:, :end] += to_values
        return dq, dk, dv


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal self-attention.

    Args:
        q: `[batch, heads, length, width]`; `length` is a multiple of `BANDS`.
        k: `[batch, heads / n, length, width]`, each head serving `n` query heads.
        v: same shape as `k`.
        scale: factor of the scores.

    Returns:
        `[batch, heads, length, width]`.
    """
    batch, heads, length, width = q.shape
    rows = batch * k.shape[1]
    keys, values = k.reshape(rows, length, width), v.reshape(rows, length, width)
    stacked = (q * scale).reshape(rows, heads // k.shape[1], length, width)
    attended: Tensor = _CausalAttention.apply(stacked, keys, values)  # type: ignore[no-untyped-call]
    return attended.reshape(batch, heads, length, width)


def _serves(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    return (
        mask is None
        and torch.is_grad_enabled()
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2]
        and query.shape[2] % BANDS == 0
        and not options.get("dropout")
        and options.get("is_causal") is not False
        and options.get("s_aux") is None
        and options.get("softcap") is None
    )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form that Transformers calls."""
    causal = getattr(module, "is_causal", True)  # as Transformers' own functions ask
    if not causal or not _serves(query, key, attention_mask, options):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return output
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return causal_attention(query, key, value, scale).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make this implementation known to Transformers, with the masks of "sdpa"; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
