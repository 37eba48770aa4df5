"""`model_dtype`: the dtype of what a folder keeps, and of the weights before they are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.config.groups import long_dtype

_NAMED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def named_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of an option; None for the checkpoint's own."""
    return None if name is None or name == "auto" else _NAMED[long_dtype(name)]


def as_wanted(weight: Tensor, wanted: torch.dtype | None) -> Tensor:
    """A weight from disk in the dtype that it is rounded from; None for its own."""
    return weight if wanted is None else weight.to(wanted)
