"""`model_dtype`: the dtype of what a folder keeps, and of the weights before they are rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from auto_round.config.groups import long_dtype
from auto_round.facts.tensor import TensorSpec
from auto_round.pipeline.deciding.job import Job

_NAMED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def named_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of an option; None for the checkpoint's own."""
    return None if name is None or name == "auto" else _NAMED[long_dtype(name)]


def wanted_dtype(job: Job) -> torch.dtype | None:
    """The dtype that the user asked for; None to keep the model's own."""
    return named_dtype(job.options.model.model_dtype)


def kept_tensors(job: Job) -> Mapping[str, TensorSpec]:
    """Every tensor of the source as an output folder keeps it.

    Those of another dtype than most weights stay: a model keeps them so on purpose (routers in float32).
    """
    wanted, tensors = wanted_dtype(job), job.source.tensors
    sizes: Counter[torch.dtype] = Counter()
    for spec in tensors.values():
        if spec.dtype in _NAMED.values():
            sizes[spec.dtype] += torch.Size(spec.shape).numel()
    if wanted is None or not sizes:
        return tensors
    own = sizes.most_common(1)[0][0]
    return {n: replace(s, dtype=wanted) if s.dtype is own else s for n, s in tensors.items()}


def as_wanted(job: Job, weight: Tensor) -> Tensor:
    """A weight from disk in the dtype that it is rounded from."""
    wanted = wanted_dtype(job)
    return weight if wanted is None else weight.to(wanted)
