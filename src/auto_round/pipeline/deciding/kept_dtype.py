"""`model_dtype`: the dtype of what a folder keeps, and of the weights before they are rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from auto_round.config.groups import long_dtype
from auto_round.facts.tensor import TensorSpec

_NAMED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def named_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of an option; None for the checkpoint's own."""
    return None if name is None or name == "auto" else _NAMED[long_dtype(name)]


def kept_tensors(tensors: Mapping[str, TensorSpec], wanted: torch.dtype | None) -> Mapping[str, TensorSpec]:
    """Every tensor of the source as an output folder keeps it.

    Those of another dtype than most weights stay: a model keeps them so on purpose (routers in float32).

    Args:
        tensors: what the source holds.
        wanted: the dtype that the user asked for; None for the model's own.
    """
    sizes: Counter[torch.dtype] = Counter()
    for spec in tensors.values():
        if spec.dtype in _NAMED.values():
            sizes[spec.dtype] += torch.Size(spec.shape).numel()
    if wanted is None or not sizes:
        return tensors
    own = sizes.most_common(1)[0][0]
    return {n: replace(s, dtype=wanted) if s.dtype is own else s for n, s in tensors.items()}


def as_wanted(weight: Tensor, wanted: torch.dtype | None) -> Tensor:
    """A weight from disk in the dtype that it is rounded from; `wanted` as for `kept_tensors`."""
    return weight if wanted is None else weight.to(wanted)
