"""How a module of fused experts computes: what its attributes say, and the same done expert by expert.

Transformers' modules of experts follow one contract (`use_experts_implementation`): parameters
`[n_experts, out, in]` (`[n_experts, in, out]` where `is_transposed`), flags for a gate and for biases, and a
call with hidden states, indices and weights. Whoever wants to look between the two products, or to multiply
packed weights, does so here, without knowing a family.

Source: Transformers 5.24 `integrations/moe.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auto_round.models.roles import fused_experts

Multiply = Callable[[int, Tensor], Tensor]
"""Product with the matrix of an expert, bias included: number of the expert, its tokens `[n, in]`."""


class ExpertCall(NamedTuple):
    """What a module of experts is called with.

    Attributes:
        hidden: `[tokens, width]`.
        chosen: experts of each token, `[tokens, k]` int64; numbers behind the last expert stand for none.
        weights: of each of them, `[tokens, k]`.
    """

    hidden: Tensor
    chosen: Tensor
    weights: Tensor


class ExpertRows(NamedTuple):
    """The tokens of one expert.

    Attributes:
        expert: its number.
        slots: places in the flattened `chosen`, `[n]` int64; a slot belongs to token `slot // k`.
    """

    expert: int
    slots: Tensor


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """The parts of a module of fused experts.

    Attributes:
        up: name of the parameter that hidden states are multiplied by first.
        down: name of the other.
        count: number of experts.
    """

    up: str
    down: str
    count: int

    @classmethod
    def of(cls, module: nn.Module) -> ExpertParts | None:
        """The parts of a module; None where it does not say how it computes."""
        flags = vars(module)
        if "is_transposed" not in flags or "has_gate" not in flags:
            return None
        parts = cls("gate_up_proj" if flags["has_gate"] else "up_proj", "down_proj", 0)
        own = dict(module.named_parameters(recurse=False))
        known = fused_experts(module)
        if parts.up not in known or parts.down not in known:
            return None
        return cls(parts.up, parts.down, len(own[parts.down]))


def chosen_experts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Indices of the experts of each token in a call, `[tokens, k]`; None where there are none."""
    found = next((x for x in (*args, *kwargs.values()) if _are_indices(x)), None)
    return None if found is None else found.reshape(-1, found.shape[-1])


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertCall | None:
    """A call of the contract; None for another one."""
    given = (*args, *kwargs.values())
    if len(given) != len(ExpertCall._fields) or not all(isinstance(x, Tensor) for x in given):
        return None
    hidden, chosen, weights = given
    same = chosen.shape == weights.shape and hidden.dim() == chosen.dim() == 2
    known = same and len(hidden) == len(chosen) and _are_indices(chosen)
    return ExpertCall(hidden, chosen, weights) if known else None


def rows_of_experts(chosen: Tensor, count: int) -> Iterator[ExpertRows]:
    """Experts that some token chose, in order, with their tokens in order."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    numbers, lengths = torch.unique_consecutive(flat[order], return_counts=True)
    for expert, slots in zip(numbers.tolist(), torch.split(order, lengths.tolist()), strict=True):
        if 0 <= expert < count:
            yield ExpertRows(expert, slots)


def multiply_by(module: nn.Module, name: str) -> Multiply:
    """The products of a module with one of its parameters."""
    weight = module.get_parameter(name)
    bias = module.get_parameter(f"{name}_bias") if vars(module).get("has_bias") else None
    transposed = fused_experts(module)[name]

    def multiply(expert: int, x: Tensor) -> Tensor:
        matrix = (weight[expert].T if transposed else weight[expert]).to(x.dtype)
        return nn.functional.linear(x, matrix, None if bias is None else bias[expert])

    return multiply


def between(module: Any, first: Tensor) -> Tensor:
    """What flows into the second matrix: the product with the first one, gated or activated."""
    made: Tensor = module._apply_gate(first) if module.has_gate else module.act_fn(first)
    return made


def run_experts(module: Any, call: ExpertCall, count: int, up: Multiply, down: Multiply) -> Tensor:
    """Output of the experts, `[tokens, width]`, computing only those that were chosen.

    Args:
        module: the module of experts, for what lies between the products.
        call: what it is called with.
        count: number of experts.
        up: product with the first matrices.
        down: product with the second matrices.
    """
    k, width = call.chosen.shape[-1], call.hidden.shape[-1]
    weights = call.weights.reshape(-1, 1)
    slots = call.hidden.new_zeros(call.chosen.numel(), width)
    for expert, at in rows_of_experts(call.chosen, count):
        found = down(expert, between(module, up(expert, call.hidden[at // k])))
        if vars(module).get("has_post_expert_norm"):
            found = module.post_expert_norm(found)
        slots[at] = (found * weights[at]).to(slots.dtype)
    return slots.reshape(len(call.hidden), k, width).sum(dim=1)


def _are_indices(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32) and value.dim() > 1
