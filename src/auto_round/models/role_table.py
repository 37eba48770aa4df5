"""The role of every matrix of a model, for people: those that differ in numbers only become one row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from auto_round.facts.layer import Role
from auto_round.facts.roles import RoleRow
from auto_round.facts.tensor import TensorSpec
from auto_round.models.anatomy import Anatomy
from auto_round.models.config_facts import expert_counts
from auto_round.models.names import NameMap
from auto_round.models.roles import find_tower_blocks, find_towers, role_in_block
from auto_round.schemes.condense import condense
from auto_round.schemes.make import KEPT_ROLES

TEXT, KEPT, EMBEDDING = "text", "kept", "embedding"
_WORDS = {Role.LINEAR: TEXT, Role.OUTSIDE: KEPT}
"""What people call roles that are named otherwise in code."""
_ORDER = (
    TEXT,
    "expert",
    "shared expert",
    "router",
    "tower",
    "modulation",
    "further layer",
    "head",
    EMBEDDING,
    KEPT,
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
NO_MODULE = "no module of the model wants it: copied as it is"


_Key = tuple[str, tuple[int, ...], str]


def role_table(
    model: Any, anatomy: Anatomy, names: NameMap, disk: Mapping[str, TensorSpec]
) -> tuple[RoleRow, ...]:
    """Every tensor on disk of two or more axes, once.

    Args:
        model: the skeleton.
        anatomy: its layers and blocks.
        names: its tensors' recipes.
        disk: dtype and shape of every tensor on disk.

    Returns:
        Rows by role, those of one role in the order of execution.
    """
    alike: dict[_Key, list[str]] = {}
    told: set[str] = set()
    for layer in anatomy.layers:
        role, note = _WORDS.get(layer.role, layer.role.value), KEPT_ROLES.get(layer.role, "")
        if layer.role is not Role.HEAD or layer.name == layer.tensor.removesuffix(".weight"):
            told.add(layer.tensor)  # a tied head lies there as the embedding
        alike.setdefault((role, layer.stored_shape, note), []).append(layer.name)
    reasons = {refusal.who: refusal.reason for refusal in anatomy.unsupported}
    look = _Others(model, anatomy, names)
    for name, spec in disk.items():
        if name in told or len(spec.shape) < 2:
            continue
        role, note = (KEPT, reasons[name]) if name in reasons else look.role(name)
        alike.setdefault((role, tuple(spec.shape), note), []).append(name.removesuffix(".weight"))
    return tuple(sorted(_rows(alike), key=lambda row: _ORDER.index(row.role)))


def _rows(alike: Mapping[_Key, Sequence[str]]) -> Iterator[RoleRow]:
    for (role, shape, note), members in alike.items():
        for found in condense(members):
            count = math.prod(len(numbers) for numbers in found.numbers)
            yield RoleRow(role, str(found), shape, count, note)


class _Others:
    """Roles of tensors that are no layer: tables looked at for each of them."""

    def __init__(self, model: Any, anatomy: Anatomy, names: NameMap) -> None:
        self._modules = dict(model.named_modules())
        self._experts = expert_counts(model.config)
        self._blocks = [f"{block.module}." for block in anatomy.blocks]
        self._towers = tuple(f"{path}." for path in (*find_tower_blocks(model), *find_towers(model)))
        self._targets = {p.name: r.targets[0] for r in names.recipes for p in r.pieces if r.targets}
        self._head = anatomy.head

    def role(self, name: str) -> tuple[str, str]:
        """Role of a tensor on disk, and why it stays as it is."""
        target = self._targets.get(name)
        if target is None:
            return KEPT, NO_MODULE
        path, _, leaf = target.rpartition(".")
        module = self._modules.get(path)
        if isinstance(module, nn.Embedding):
            return EMBEDDING, EMBEDDING
        if isinstance(module, _CONVOLUTIONS):
            return KEPT, "convolution"
        inside = next((p for p in self._blocks if target.startswith(p)), None)
        if inside is not None and self._routes(path.removeprefix(inside), module, leaf):
            return Role.ROUTER.value, KEPT_ROLES[Role.ROUTER]
        where = "encoder of images or sound" if target.startswith(self._towers) else "no linear layer"
        return KEPT, where

    def _routes(self, path: str, module: Any, leaf: str) -> bool:
        """Whether a matrix inside a block sends tokens to experts: as many rows as there are of them."""
        if leaf.endswith("bias"):  # of all experts together
            return False
        matrix = getattr(module, leaf, None)
        rows = 0 if matrix is None or matrix.dim() != 2 else int(matrix.shape[0])
        return rows > 0 and (role_in_block(path, rows, self._experts) is Role.ROUTER or rows in self._experts)
