"""A component without its blocks, called again as its pipeline called it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import UnsupportedError
from auto_round.facts.flow import States
from auto_round.facts.nested import map_tensors
from auto_round.models.recorder import Recorder
from auto_round.models.source import Trace


class Replay:
    """A component whose blocks only note what they are given; lists of blocks before may end in given states.

    What a component does between its lists of blocks (FLUX.2 joins text and image, a U-Net convolves) is
    done by its own forward.
    """

    def __init__(
        self, model: nn.Module, recorders: Sequence[Recorder], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Make ready.

        Args:
            model: real weights everywhere but in the blocks, which are stubs of `recorders`.
            recorders: what the stubs of each list of blocks report to.
            device: where the weights are.
            dtype: dtype in which it computes.
        """
        self._model, self._recorders, self._device, self._dtype = model, recorders, device, dtype

    def trace(self, inputs: Mapping[str, Any], ended: Sequence[States] = ()) -> Trace:
        """What every block of one list is given.

        Args:
            inputs: arguments of the component by name.
            ended: what flows out of the lists before; their number says which list is traced.

        Raises:
            UnsupportedError: its blocks do not run one after another.
        """
        recorder = self._recorders[len(ended)]
        with self._ending_in(ended):
            self._run(inputs)
        found = recorder.trace()
        if any(state.dim() != 3 for state in found.states):
            shapes = [list(state.shape) for state in found.states]
            raise UnsupportedError(
                f"what flows from block to block has shapes {shapes}, not [rows, length, width]"
            )
        return found

    def finish(self, inputs: Mapping[str, Any], ended: Sequence[States]) -> Tensor:
        """The component's output, from what flows out of all of its lists of blocks; float32 on the host."""
        with self._ending_in(ended):
            return first_tensor(self._run(inputs)).detach().cpu().float()

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        for recorder in self._recorders:
            recorder.start()
        with torch.no_grad():
            return self._model(**placed(inputs, self._device, self._dtype))

    @contextmanager
    def _ending_in(self, ended: Sequence[States]) -> Iterator[None]:
        for recorder, states in zip(self._recorders, ended, strict=False):
            recorder.ends = tuple(state.to(self._device, self._dtype) for state in states)
        try:
            yield
        finally:
            for recorder in self._recorders:
                recorder.ends = ()


def placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Nested arguments on a device; floating ones of several dimensions in `dtype`, as pipelines do."""

    def put(tensor: Tensor) -> Tensor:
        wide = tensor.is_floating_point() and tensor.dim() > 1
        return tensor.to(device, dtype) if wide else tensor.to(device)

    return map_tensors(put, value)


def first_tensor(output: Any) -> Tensor:
    """What a component predicts: its output, or the first part of it; a list of pictures is joined."""
    value = output
    while not isinstance(value, Tensor):
        parts = tuple(value.values()) if isinstance(value, Mapping) else tuple(value)
        if all(isinstance(part, Tensor) for part in parts) and isinstance(value, list):
            return torch.cat([part.reshape(1, -1) for part in parts], 1)
        value = parts[0]
    return value
