"""Manifest: every tensor of an output and where it comes from, known before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from auto_round.errors import InternalError
from auto_round.facts.layer import Layer, Role
from auto_round.facts.tensor import TensorSpec

_BEHIND = ""
"""Place of tensors that replace none of the source's: after all of them."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an output holds.

    Attributes:
        specs: name of each output tensor -> dtype and shape, in the order of the source.
        copied: names of the source's tensors that are copied byte for byte; only biases of quantized layers
            are cast, to the dtype of their spec.
        encoded: name of each quantized layer -> names of the tensors that stand for it, or that it is in.
        stacked: matrix as `Exporter.encode` names it -> its layer, where the output has it in one tensor with
            others, as the source does (`layer.tensor`).
    """

    specs: Mapping[str, TensorSpec]
    copied: tuple[str, ...]
    encoded: Mapping[str, tuple[str, ...]]
    stacked: Mapping[str, Layer] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_nbytes(spec) for spec in self.specs.values())

    def layer_bytes(self) -> dict[str, int]:
        """Name of each quantized layer -> bytes of its tensors; layers of one tensor have equal shares."""
        owners = Counter(name for names in self.encoded.values() for name in names)
        return {
            layer: sum(_nbytes(self.specs[name]) // owners[name] for name in names)
            for layer, names in self.encoded.items()
        }


def make_manifest(
    parts: Mapping[str, Mapping[str, TensorSpec]],
    layers: Sequence[Layer],
    tensors: Mapping[str, TensorSpec],
    *,
    bias_dtype: torch.dtype | None = None,
) -> Manifest:
    """Manifest of a folder that keeps everything but its quantized layers.

    Args:
        parts: name of each quantized layer -> what stands for it.
        layers: the layers of the plan.
        tensors: everything in the source, by name.
        bias_dtype: dtype of the biases of quantized layers; None for their own.

    Raises:
        InternalError: two tensors of one name.
    """
    biases = {f"{name}.bias" for name in parts}
    replacing: dict[str, list[str]] = {}
    for layer in layers:
        if layer.name in parts:
            place = _BEHIND if layer.tensor not in tensors or _is_tied(layer) else layer.tensor
            replacing.setdefault(place, []).append(layer.name)
    specs: dict[str, TensorSpec] = {}
    for name, spec in tensors.items():
        if name not in replacing:
            dtype = (bias_dtype or spec.dtype) if name in biases else spec.dtype
            _add(specs, {name: replace(spec, dtype=dtype)})
        for layer_name in replacing.get(name, ()):
            _add(specs, parts[layer_name])
    for layer_name in replacing.get(_BEHIND, ()):
        _add(specs, parts[layer_name])
    copied = tuple(name for name in tensors if name not in replacing)
    return Manifest(specs, copied, {name: tuple(spec) for name, spec in parts.items()})


def _is_tied(layer: Layer) -> bool:
    """Whether a head shares its tensor on disk with the embedding, which stays."""
    return layer.role is Role.HEAD and layer.tensor != f"{layer.name}.weight"


def _add(specs: dict[str, TensorSpec], more: Mapping[str, TensorSpec]) -> None:
    clash = sorted(specs.keys() & more.keys())
    if clash:
        raise InternalError(f"two output tensors are named {clash[0]}")
    specs.update(more)


def _nbytes(spec: TensorSpec) -> int:
    size = spec.dtype.itemsize
    for n in spec.shape:
        size *= n
    return size
