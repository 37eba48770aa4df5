"""Causal attention for tuning on a CPU: same result as PyTorch's, about twice as fast to differentiate.

PyTorch's own CPU kernel spends most of a tuning step in its backward pass, and takes three times as long as
products of matrices in bfloat16. Here queries are cut into bands so that half of the masked scores is never
computed. The probabilities are kept from the forward pass where gradients follow; where none do, no more of
them are formed at a time than fit in a core's cache.
Registered under `NAME` through Transformers' public `AttentionInterface`; anything but plain causal
self-attention on a CPU goes to Transformers' own implementation.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from auto_round.models.class_source import compares

NAME = "auto_round_causal"
STATES = "auto_round_states"
"""Option of the attention function, see `_attend`."""
BANDS = 4
"""Into so many bands queries are cut where gradients follow."""
QUERIES = 128
"""Queries of a band where none do: the first tokens of a row get the same bits whatever comes behind them,
up to the end of a band. Narrower ones make products slower, wider ones more that is masked (docs/LOG.md)."""
FEWEST = 16
"""Tokens below which there is nothing to gain. What is written is checked on beginnings of rows that are no
shorter (`compare_rows.PROMPT_TOKENS`), or they would run by another program than the rows did."""
CACHED = 1 << 19
"""Bytes of scores that are formed at a time: half of a core's second cache, or less."""

States: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, `[batch, heads, tokens, width]`."""


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T + causal mask) v.

    `q` is `[rows, repeats, length, width]` and scaled, `k` is `[rows, length, width]` and `v`
    `[rows, length, v_width]`: query heads that share a key head are stacked below each other, so that no key
    is copied and their gradients add up by themselves.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, kept = _forward(q, k, v, q.shape[2] // BANDS)
        ctx.save_for_backward(q, k, v, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        rows, repeats, length, width = q.shape
        size = length // BANDS
        dq, dk, dv = torch.empty_like(q), k, v
        for i in reversed(range(BANDS)):  # the last band writes all gradients, others add
            p, band, end = kept[i], slice(i * size, (i + 1) * size), (i + 1) * size
            g = grad[:, :, band].reshape(rows, repeats * size, v.shape[-1])
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


def _forward(q: Tensor, k: Tensor, v: Tensor, queries: int) -> tuple[Tensor, list[Tensor]]:
    """What attention gives, and the probabilities of each band of so many queries (fewer in the last)."""
    rows, repeats, length, width = q.shape
    widest = min(queries, length)
    blocked = torch.full((widest, widest), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    kept, outputs = [], []
    for start in range(0, length, queries):
        end = min(start + queries, length)
        size = end - start
        stacked = q[:, :, start:end].reshape(rows, repeats * size, width)
        scores = stacked @ k[:, :end].transpose(1, 2)
        scores.view(rows, repeats, size, end)[..., start:].add_(blocked[:size, :size])
        p = torch.softmax(scores, -1)
        outputs.append((p @ v[:, :end]).view(rows, repeats, size, v.shape[-1]))
        kept.append(p)
    return torch.cat(outputs, 2), kept


def _without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same output; as many rows at a time as have scores that stay in a core's cache."""
    rows, repeats, length, _ = q.shape
    most = max(1, CACHED // (repeats * min(QUERIES, length) * length * q.element_size()))
    some = next(n for n in range(min(most, rows), 0, -1) if rows % n == 0)  # few shapes: few programs
    output = q.new_empty(rows, repeats, length, v.shape[-1])
    for first in range(0, rows, some):
        part = slice(first, first + some)
        output[part] = _forward(q[part], k[part], v[part], QUERIES)[0]
    return output


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal self-attention.

    Args:
        q: `[batch, heads, length, width]`; where gradients follow `length` is a multiple of `BANDS`.
        k: `[batch, heads / n, length, width]`, each head serving `n` query heads.
        v: `[batch, heads / n, length, v_width]`; multi-head latent attention has values narrower than keys.
        scale: factor of the scores.

    Returns:
        `[batch, heads, length, v_width]`.
    """
    batch, heads, length, width = q.shape
    rows = batch * k.shape[1]
    keys, values = k.reshape(rows, length, width), v.reshape(rows, length, v.shape[-1])
    stacked = (q * scale).reshape(rows, heads // k.shape[1], length, width)
    if torch.is_grad_enabled():
        attended: Tensor = _CausalAttention.apply(stacked, keys, values)  # type: ignore[no-untyped-call]
    else:
        attended = _without_gradients(stacked, keys, values)
    return attended.reshape(batch, heads, length, v.shape[-1])


_CHANGES = ("s_aux", "softcap", "position_bias")
"""Options that change the scores."""


def _serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    return (
        mask is None
        and q.device.type == "cpu"
        and _fits(q, k, v)
        and not options.get("dropout")
        and options.get("is_causal") is not False
        and all(options.get(name) is None for name in _CHANGES)
    )


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal_attention` takes tensors of these shapes and dtypes."""
    return (
        q.dim() == k.dim() == v.dim() == 4
        and q.dtype == k.dtype == v.dtype
        and q.shape[0] == k.shape[0]
        and q.shape[1] % k.shape[1] == 0
        and q.shape[2:] == k.shape[2:]
        and k.shape[:3] == v.shape[:3]
        and (q.shape[2] % BANDS == 0 if torch.is_grad_enabled() else q.shape[2] >= FEWEST)
    )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form that Transformers calls.

    The option `STATES` is a function that is shown queries, keys and values, and says what to go on with.
    """
    change = options.pop(STATES, None)
    if change is not None:
        query, key, value = change(query, key, value)
    causal = getattr(module, "is_causal", True)  # as Transformers' own functions ask
    if not causal or not _serves(query, key, value, attention_mask, options):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return output
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scale).transpose(1, 2).contiguous(), None


def install(model: Any) -> None:
    """Let a model that would take PyTorch's attention take this one.

    Some models (those with sparse attention) ask in their own code whether their attention is called "sdpa",
    and compute something else if it is not. They keep PyTorch's.
    """
    if model.config._attn_implementation == "sdpa" and not compares(model, "_attn_implementation", "sdpa"):
        model.set_attn_implementation(register())


def register() -> str:
    """Make this implementation known to Transformers, with the masks of "sdpa"; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
