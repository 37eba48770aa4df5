"""Attention modules of a model: what flows into their products of queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

QUERIES, KEYS, VALUES = "q", "k", "v"
"""What an attention multiplies, by the first letter of its scale's name on disk."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention module.

    Attributes:
        name: its name on disk, for example `model.layers.0.self_attn`.
        module: dotted path in the module tree.
        block: index of the block that it belongs to.
        heads: query heads.
        kv_heads: heads of keys and values, each serving some query heads.
        dtype: of its weights, in which readers hold its scales.
    """

    name: str
    module: str
    block: int
    heads: int
    kv_heads: int
    dtype: torch.dtype

    def heads_of(self, part: str) -> int:
        """Heads of `QUERIES`, `KEYS` or `VALUES`."""
        return self.heads if part == QUERIES else self.kv_heads
