"""What the rest of the package knows of a model before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from auto_round.facts.flow import HIDDEN_STATES, Flow

if TYPE_CHECKING:
    import torch


class Role(Enum):
    """What a weight does in its model; decides what the default rules do with it."""

    LINEAR = "linear"
    EXPERT = "expert"
    SHARED_EXPERT = "shared expert"
    ROUTER = "router"
    HEAD = "head"
    TOWER = "tower"
    OUTSIDE = "outside the blocks"
    MODULATION = "modulation"
    FURTHER = "further layer"


@dataclass(frozen=True, slots=True)
class Layer:
    """One matrix that could be quantized, as it lies on disk, and the dtype in which outputs keep it.

    Attributes:
        name: name on disk without `.weight`, for example `model.layers.0.mlp.up_proj`; names in plans,
            patterns, exported tensors and configs are these.
        tensor: full tensor name on disk.
        parameter: dotted name of the parameter inside the Transformers module tree that holds it.
        shape: `(out, in)`.
        dtype: dtype in which an output keeps it: that on disk, unless the user asks for another.
        block: index of the block that it belongs to, None outside of blocks.
        role: what it does.
        expert: index of the expert inside a fused `[n_experts, rows, in]` parameter; None for plain matrices.
        rows: first and last-plus-one row of this matrix inside its (expert's) parameter, and the distance of
            rows where they are not neighbours; None for all rows.
        transposed: it lies on disk as `[in, out]`, as GPT-2's matrices do.
        fused: its tensor on disk holds the whole parameter: `expert` and `rows` say where it lies there too.
        whole: engines read that tensor as a whole, not matrix by matrix.
        rebuilt: Transformers makes linear layers of the matrices of that tensor, for compressed-tensors.
        asked: other code of the model asks for its weight, which not every loader of packed weights can give.
    """

    name: str
    tensor: str
    parameter: str
    shape: tuple[int, int]
    dtype: torch.dtype
    block: int | None
    role: Role
    expert: int | None = None
    rows: tuple[int, ...] | None = None
    transposed: bool = False
    fused: bool = False
    whole: bool = False
    rebuilt: bool = False
    asked: bool = False

    @property
    def alone(self) -> str:
        """Name of the matrix as a tensor of its own."""
        return f"{self.name}.weight" if self.fused else self.tensor

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the dtype in which an output keeps it."""
        return self.weights * self.dtype.itemsize

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the tensor on disk."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a model.

    Attributes:
        index: position in the order of execution, over all lists.
        module: dotted path in the module tree, for example `model.layers.0`.
        disk: prefix of its tensors on disk, for example `model.layers.0`.
        flow: what it takes from the block before it.
        in_list: number of the list that it belongs to: a model has one, or several that run after each other.
    """

    index: int
    module: str
    disk: str
    flow: Flow = HIDDEN_STATES
    in_list: int = 0
