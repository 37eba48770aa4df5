"""Matrices that no module of Transformers runs: layers for multi-token prediction.

`mtp.*`, or a block behind the last one. They are built like the blocks, and other engines run them. So a
matrix whose name ends as that of a layer in the blocks, with its shape, does what that layer does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from auto_round.facts.inputs import WEIGHT
from auto_round.facts.layer import Block, Layer, Role
from auto_round.facts.tensor import TensorSpec

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

_Kind = tuple[str, tuple[int, ...]]


def further_layers(
    orphans: Iterable[str], disk: Mapping[str, TensorSpec], layers: Sequence[Layer], blocks: Sequence[Block]
) -> Iterator[Layer]:
    """Layers among the tensors that no module wants; routers and what has no like in the blocks are none.

    Args:
        orphans: names on disk.
        disk: dtype and shape of every tensor on disk.
        layers: layers of the blocks.
        blocks: the blocks.
    """
    known = dict(_kinds(layers, blocks))
    for name in orphans:
        spec = disk[name]
        like = next((known[k] for k in _endings(name, spec.shape) if k in known), None)
        if like is not None and like.role is not Role.ROUTER:
            shape = (spec.shape[0], spec.shape[1])
            yield Layer(
                name=name.removesuffix(WEIGHT),
                tensor=name,
                parameter=name,
                shape=shape[::-1] if like.transposed else shape,
                dtype=spec.dtype,
                block=None,
                role=Role.FURTHER,
                transposed=like.transposed,
            )


def _kinds(layers: Sequence[Layer], blocks: Sequence[Block]) -> Iterator[tuple[_Kind, Layer]]:
    """Name inside the block with `*` for numbers, and shape on disk -> a layer of that kind."""
    for layer in layers:
        prefix = "" if layer.block is None else f"{blocks[layer.block].disk}."
        if prefix and layer.tensor.startswith(prefix):
            yield (_starred(layer.tensor.removeprefix(prefix)), layer.stored_shape), layer


def _endings(name: str, shape: tuple[int, ...]) -> Iterator[_Kind]:
    """Ends of a name, the longest first."""
    parts = name.split(".")
    for start in range(1, len(parts)):
        yield _starred(".".join(parts[start:])), tuple(shape)


def _starred(name: str) -> str:
    return _NUMBER.sub("*", f".{name}").removeprefix(".")
