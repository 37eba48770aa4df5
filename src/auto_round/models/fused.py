"""Experts that lie on disk as one tensor: where each matrix lies in it, and the names it is written under.

gpt-oss, Llama 4, Granite-MoE, Gemma 4, Qwen3-VL-MoE, Aria and others keep a projection of all experts in one
tensor, `[n_experts, out, in]` or `[n_experts, in, out]`, gate and up one behind the other or row by row in
turn. Engines read quantized experts one by one: `<experts>.<number>.<projection>.<part>`. So that is how they
are written, and this file is the only one that knows both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auto_round.facts.inputs import WEIGHT
from auto_round.models.experts import ExpertParts

_CONTAINER = "experts"
_GATE, _UP, _DOWN = "gate_proj", "up_proj", "down_proj"
_OWN_WAY = {"Llama4TextExperts": ExpertParts("gate_up_proj", "down_proj", 0)}
"""Classes outside of the contract of `models.experts` whose experts are `[n_experts, in, out]` all the same.

Source: Transformers 5.24 `models/llama4/modeling_llama4.py`.
"""
_TAKEN_WHOLE = ("GptOssExperts", "OpenAIPrivacyFilterExperts")
"""Classes whose experts no engine reads one by one: vLLM's loader for gpt-oss knows whole tensors, in 16 bits
and MXFP4. For others its loader takes `<experts>.<number>.gate_proj` and so on beside the tensor of all.

Source: vLLM 0.32 `models/gpt_oss.py`, `layers/fused_moe/routed_experts.py`.
"""


@dataclass(frozen=True, slots=True)
class MatrixPlace:
    """Rows of a parameter that are exactly one matrix on disk.

    Attributes:
        expert: index in the first dimension of a 3-D parameter; None in a 2-D one.
        rows: first and last-plus-one row, and the distance of rows where they are not neighbours; None for
            all rows.
    """

    expert: int | None = None
    rows: tuple[int, ...] | None = None


class FusedMatrix(NamedTuple):
    """One matrix of a fused tensor: its name without `.weight`, and where it lies in the parameter."""

    name: str
    place: MatrixPlace


def of_transformers(module: nn.Module) -> nn.Module:
    """The module of Transformers that a stand-in for experts replaces; any other module itself."""
    found: nn.Module = vars(module).get("_fused", (module,))[0]
    return found


def transposed_parts(module: nn.Module) -> ExpertParts | None:
    """Parts of experts outside of the contract that are stored `[n_experts, in, out]`; None for others."""
    return _OWN_WAY.get(type(module).__name__)


def stored_turned(module: nn.Module) -> bool:
    """Whether a module of Transformers keeps the matrices of its experts as `[in, out]`."""
    return bool(vars(module).get("is_transposed")) or transposed_parts(module) is not None


def taken_whole(module: nn.Module) -> bool:
    """Whether engines read the experts of a module as one tensor only."""
    return type(of_transformers(module)).__name__ in _TAKEN_WHOLE


def split(module: nn.Module, parameter: str, tensor: str) -> tuple[FusedMatrix, ...] | str:
    """The matrices of a parameter of experts that is one tensor on disk, or why they are not known.

    Args:
        module: the experts, or what stands in for them.
        parameter: own parameter, its matrices `[n_experts, out, in]` in rows as below.
        tensor: its name on disk.
    """
    fused = of_transformers(module)
    parts = ExpertParts.of(module) or transposed_parts(fused)
    if parts is None or parameter not in (parts.up, parts.down):
        return f"{type(fused).__name__} does not say how its experts compute"
    count, *matrix = fused.get_parameter(parameter).shape
    height = matrix[1] if stored_turned(fused) else matrix[0]
    rows: dict[str, tuple[int, ...] | None] = {_DOWN if parameter == parts.down else _UP: None}
    if parameter == parts.up and parts.up == "gate_up_proj":
        if vars(fused).get("is_concatenated", True):
            rows = {_GATE: (0, height // 2), _UP: (height // 2, height)}
        else:
            rows = {_GATE: (0, height, 2), _UP: (1, height, 2)}
    around = tensor.removesuffix(WEIGHT).rpartition(".")[0]
    container = around if around.rpartition(".")[2] == _CONTAINER else f"{around}.{_CONTAINER}"
    return tuple(
        FusedMatrix(f"{container}.{expert}.{name}", MatrixPlace(expert, each))
        for expert in range(count)
        for name, each in rows.items()
    )


@dataclass(slots=True)
class Stacking:
    """Makes a parameter of its matrices, with the calls of Transformers' own converters (`names.Recipe`).

    Attributes:
        target: the parameter.
        shape: of it.
        turned: the module keeps its matrices as `[in, out]`.
        places: tensor on disk -> where it lies.
    """

    target: str
    shape: tuple[int, ...]
    turned: bool
    places: Mapping[str, MatrixPlace]
    _added: dict[str, Tensor] = field(default_factory=dict)

    def add_tensor(self, key: str, name: str, pattern: str, tensor: Tensor) -> None:
        """Take one matrix, `[out, in]`."""
        del key, pattern
        self._added[name] = tensor

    def convert(self, key: str, model: Any = None, config: Any = None) -> dict[str, Tensor]:
        """The parameter of all matrices."""
        del key, model, config
        first = next(iter(self._added.values()))
        made = torch.empty(self.shape, dtype=first.dtype, device=first.device)
        straight = made.mT if self.turned else made
        for name, tensor in self._added.items():
            place = self.places[name]
            matrix = straight[0 if place.expert is None else place.expert]
            matrix[slice(*place.rows) if place.rows else slice(None)] = tensor
        return {self.target: made}


def heights(shape: tuple[int, ...], pieces: tuple[FusedMatrix, ...]) -> Iterator[int]:
    """Rows of each piece of a parameter `[n_experts, out, in]`."""
    for piece in pieces:
        yield shape[1] if piece.place.rows is None else len(range(*piece.place.rows))


def lies_turned(converter: Any, alike: bool) -> bool | None:
    """Whether a converter of Transformers exchanges the axes of matrices; None where it does anything else.

    Its operations are known by their names, for they say nothing of themselves.

    Args:
        converter: None for none.
        alike: the tensor has the same shape on disk as in the model.
    """
    operations = [] if converter is None else list(converter.operations)
    if not operations:
        return False
    if [type(each).__name__ for each in operations] != ["Transpose"]:
        return None
    return not (operations[0].check_dims and alike)
