"""How many tokens reach each expert: rows that leave an expert out tell nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.calibration.observe import MaskOf

_FUSED = 3
"""Dimensions of a parameter that holds one matrix for each expert."""


@contextmanager
def observe_experts(block: nn.Module, mask_of: MaskOf | None = None) -> Iterator[Mapping[str, Tensor]]:
    """Count the tokens of each expert while the context lasts.

    Experts are told by what Transformers' modules of fused experts have in common: a parameter
    `[n_experts, rows, in]`, and a call with the indices of the experts of each token, `[tokens, k]` int64.

    Args:
        block: any module; it is left as it was.
        mask_of: asked at each call for the mask of the batch that is running, `[batch, tokens] bool`.

    Yields:
        Module name -> tokens that reached each expert, `[n_experts] int64`, filled by running the block.
    """
    sizes = {name: _experts(module) for name, module in block.named_modules()}
    counts = {
        name: torch.zeros(size, dtype=torch.int64, device="cpu") for name, size in sizes.items() if size
    }
    handles = [
        block.get_submodule(name).register_forward_pre_hook(partial(_count, seen, mask_of), with_kwargs=True)
        for name, seen in counts.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _experts(module: nn.Module) -> int:
    """Number of experts that the module itself holds in one parameter; 0 for none."""
    return max((len(p) for p in module.parameters(recurse=False) if p.dim() == _FUSED), default=0)


def _count(
    counts: Tensor, mask_of: MaskOf | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    del module
    chosen = next((x for x in (*args, *kwargs.values()) if _are_indices(x)), None)
    if chosen is None:
        return
    chosen = chosen.reshape(-1, chosen.shape[-1])
    mask = None if mask_of is None else mask_of()
    if mask is not None and mask.numel() == len(chosen):
        chosen = chosen[mask.reshape(-1).to(chosen.device)]
    # An index behind the last expert stands for none.
    counts += torch.bincount(chosen.reshape(-1).cpu(), minlength=len(counts))[: len(counts)]


def _are_indices(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32) and value.dim() > 1
