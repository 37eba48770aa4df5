"""Scales of the key/value cache and of attention in compressed-tensors folders.

Keys and values have a scheme of their own in the configuration (`kv_cache_scheme`). By it vLLM keeps FP8
caches with these scales, and the package rounds keys and values in Transformers before 5.24, where the
argument that it looks for got another name. Queries have `q_scale` beside them, which vLLM reads too. A
config group for attention, by which the package would round queries, has no weights, and vLLM 0.32 does not
load a folder with such a group: so there is none.

Source: compressed-tensors 0.20 `quantization/lifecycle/apply.py`, `initialize.py` (names and shapes);
vLLM 0.32 `quantization/compressed_tensors/compressed_tensors.py` (`CompressedTensorsKVCacheMethod`,
`_quantization_scheme_map_from_config`).
"""

from __future__ import annotations

from typing import Any

from auto_round.facts.attention import Attention
from auto_round.facts.tensor import TensorSpec
from auto_round.schemes.attention import AttentionPlan


def cache_scheme(caches: AttentionPlan) -> dict[str, Any]:
    """The `kv_cache_scheme` of a configuration."""
    return {
        "num_bits": 8,
        "type": "float",
        "strategy": "attn_head" if caches.scheme.per_head else "tensor",
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
    }


def scale_name(attention: Attention, part: str) -> str:
    """Full name of the scales of `q`, `k` or `v`."""
    return f"{attention.name}.{part}_scale"


def scale_specs(caches: AttentionPlan) -> dict[str, TensorSpec]:
    """Full tensor name -> dtype and shape: `[1]`, or `[heads, 1, 1]` with a scale for each head."""
    return {
        scale_name(attention, part): TensorSpec(
            attention.dtype, (count, 1, 1) if caches.scheme.per_head else (count,)
        )
        for attention in caches.modules
        for part, count in caches.scales(attention).items()
    }
