"""Modules as engines build them: q/k/v and gate/up in one matrix, all experts of a block in another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from auto_round.export.reader_names import EXPERTS, MERGED
from auto_round.schemes.siblings import fused_groups
from auto_round.stored.matrices import Matrix

LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Module:
    """One module of an engine.

    Attributes:
        name: its path there, for example `model.layers.0.self_attn.qkv_proj`.
        parts: the matrices in it.
        experts: it holds the experts of a block.
    """

    name: str
    parts: tuple[Matrix, ...]
    experts: bool = False

    @property
    def head(self) -> bool:
        """Whether it is the output head."""
        return self.name.rpartition(".")[2] == LM_HEAD


def split_modules(matrices: Iterable[Matrix]) -> tuple[Module, ...]:
    """One module for each matrix, as engines have them that fuse nothing (Transformers, GPTQModel)."""
    return tuple(Module(m.name, (m,)) for m in matrices if _is_layer(m))


def fused_modules(matrices: Iterable[Matrix]) -> tuple[Module, ...]:
    """Modules as vLLM and SGLang have them.

    Layers outside of the blocks are left out unless they are packed or the head: engines do not ask the
    configuration for embeddings and the like.
    """
    layers = {m.name: m for m in matrices if _is_layer(m)}
    containers = _experts(layers)
    for name in layers:
        if name not in containers:
            containers |= dict.fromkeys(*_merged(name, layers))
    modules: dict[str, list[Matrix]] = {}
    for name, matrix in layers.items():
        modules.setdefault(containers.get(name, name), []).append(matrix)
    experts = set(_experts(layers).values())
    return tuple(Module(name, tuple(parts), name in experts) for name, parts in modules.items())


def _experts(layers: Mapping[str, Matrix]) -> dict[str, str]:
    """Layer of an expert -> the module that holds all experts of its block."""
    inside = [name for name, matrix in layers.items() if matrix.in_block]
    groups = fused_groups(inside)
    found = {c: names for c, names in groups.items() if c.rpartition(".")[2] == EXPERTS[0]}
    return {name: container for container, names in found.items() for name in names}


def _merged(name: str, layers: Mapping[str, Matrix]) -> tuple[list[str], str]:
    """Parts and name of the merged matrix that begins with this layer; no parts where none does."""
    parent, _, last = name.rpartition(".")
    for merged, parts in MERGED:
        present = [part for p in parts if (part := f"{parent}.{p}") in layers]
        if last == parts[0] and len(present) > 1:
            return present, f"{parent}.{merged}"
    return [], name


def _is_layer(matrix: Matrix) -> bool:
    """Whether an engine builds a linear layer for a matrix: all in blocks, and packed ones elsewhere."""
    return matrix.in_block or matrix.packed or matrix.name.rpartition(".")[2] == LM_HEAD
