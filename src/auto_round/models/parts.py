"""What is known of a model whose weights are not there: what every model source is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.facts.tensor import TensorSpec
from auto_round.models.anatomy import Anatomy
from auto_round.models.names import NameMap


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A model without weights and everything known of it.

    Attributes:
        model: the skeleton; derived buffers are real, the rest is on the meta device.
        dtype: dtype in which it computes unless asked otherwise.
        tensors: everything on disk.
        names: how module tensors are made from those on disk.
        tied: module tensor -> module tensor whose data it shares.
        anatomy: layers and blocks.
        wanted: dtype in which outputs keep its weights; None for that on disk.
    """

    model: Any
    dtype: torch.dtype
    tensors: Mapping[str, TensorSpec]
    names: NameMap
    tied: Mapping[str, str]
    anatomy: Anatomy
    wanted: torch.dtype | None = None
