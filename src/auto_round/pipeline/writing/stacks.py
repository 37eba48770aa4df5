"""Tensors that hold the matrices of all experts, put together from matrices as they come."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.checkpoint.tensors import matrix_of
from auto_round.export.manifest import Manifest


class Stacks:
    """Matrices of an output that has them in one tensor, kept until all of it is there.

    They belong to one block, whose layers are written before the journal tells of any of them: so a run that
    is killed in between makes all of them again. May be used by several threads.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Nothing has come yet.

        Args:
            manifest: of the output; says which matrices it has in one tensor.
        """
        self._layers, self._specs = manifest.stacked, manifest.specs
        self._members: dict[str, set[str]] = {}
        for name, layer in self._layers.items():
            self._members.setdefault(layer.tensor, set()).add(name)
        self._begun: dict[str, tuple[Tensor, set[str]]] = {}
        self._lock = threading.Lock()

    def complete(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What can be written once these tensors are there: stacks with their last matrix, others at once."""
        ready: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            layer = self._layers.get(name)
            if layer is None or layer.expert is None:
                ready[name] = tensor
                continue
            with self._lock:
                if layer.tensor not in self._begun:
                    spec = self._specs[layer.tensor]
                    self._begun[layer.tensor] = torch.empty(spec.shape, dtype=spec.dtype, device="cpu"), set()
                stack, there = self._begun[layer.tensor]
                matrix_of(layer, stack[layer.expert]).copy_(tensor)
                there.add(name)
                if there == self._members[layer.tensor]:
                    ready[layer.tensor] = self._begun.pop(layer.tensor)[0]
        return ready
