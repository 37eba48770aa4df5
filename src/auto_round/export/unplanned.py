"""Matrices of a checkpoint that no plan knows: routers and experts that are bare parameters, further blocks.

Readers may build linear layers for them, and ask the configuration about each: vLLM's Qwen3-MoE asks whether
`mlp.gate` is quantized, and layers for multi-token prediction lie beside the blocks. So configurations must
say that they are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from auto_round.facts.inputs import WEIGHT
from auto_round.facts.layer import Block, Layer, Role
from auto_round.facts.tensor import TensorSpec
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.plan import Plan


def with_unplanned(
    plan: Plan,
    layers: Sequence[Layer],
    blocks: Sequence[Block],
    tensors: Mapping[str, TensorSpec],
    parameters: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Plan, tuple[Layer, ...]]:
    """The plan and its layers with every other matrix of the source but embeddings, kept.

    Args:
        plan: what becomes of each layer.
        layers: the layers of the plan.
        blocks: the blocks of the model.
        tensors: everything in the source, by name.
        parameters: tensor of the source -> parameter of the module tree that it becomes, where that is known.
    """
    planned = {layer.tensor for layer in layers} | {layer.name + WEIGHT for layer in layers}
    # A module that holds planned layers cannot be named: readers take its name for theirs.
    parents = {place for layer in plan.entries for place in _places(layer)}
    indices = {block.disk: block.index for block in blocks}
    found: dict[str, Layer] = {}
    for tensor, spec in tensors.items():
        name = None if tensor in planned else _module(tensor, spec)
        if name is not None and name not in plan.entries and name not in parents:
            block = next((indices[place] for place in _places(name) if place in indices), None)
            role = Role.OUTSIDE if block is None else Role.ROUTER
            shape = (spec.shape[-2], spec.shape[-1])
            found[name] = Layer(name, tensor, parameters.get(tensor, tensor), shape, spec.dtype, block, role)
    entries = {**plan.entries, **{name: PlanEntry(None, "no linear layer") for name in found}}
    return replace(plan, entries=entries), (*layers, *found.values())


def _module(tensor: str, spec: TensorSpec) -> str | None:
    """Module of a matrix, or of a stack of matrices without modules of their own; None for anything else."""
    name, _, last = tensor.rpartition(".")
    if (
        sum(size > 1 for size in spec.shape) < 2
        or "emb" in name.rpartition(".")[2]
        or name.endswith(("wte", "wpe"))
    ):
        return None
    return name if f".{last}" == WEIGHT or len(spec.shape) > 2 else None


def _places(name: str) -> Iterator[str]:
    """All beginnings of a name that end before a dot, the longest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name
