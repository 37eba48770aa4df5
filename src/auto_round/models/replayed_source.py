"""Parts of a pipeline of diffusers that are called again as their pipeline called them, block by block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.checkpoint.tensors import Tensors
from auto_round.models.assembled import AssembledSource
from auto_round.models.materialize import freed_on_exit, real_copy
from auto_round.models.recorder import Recorder, make_stubs
from auto_round.models.replay_stem import Replay
from auto_round.models.trace import LeftOut


class ReplayedSource(AssembledSource):
    """A `ModelSource` whose rows are whole calls of the part, recorded while its pipeline ran."""

    def handed_on(self, length: int, dtype: torch.dtype) -> int:
        """Nothing: all that blocks hand on flows."""
        del length, dtype
        return 0

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The part's folder."""

    @property
    @abstractmethod
    def files(self) -> Tensors:
        """Its tensors as they are copied; see `ModelSource`."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    @contextmanager
    def replay(self, device: torch.device, dtype: torch.dtype) -> Iterator[Replay]:
        """The part without its blocks; weights on entry, freed on exit.

        Args:
            device: where the weights go.
            dtype: dtype in which it computes.
        """
        left_out = self._left_out
        real, recorders = self._stubbed(left_out, self._outside(device, dtype), device, dtype)
        with freed_on_exit(real):
            self._settle(real, recorders)
            yield Replay(real, recorders, device, dtype)

    @contextmanager
    def streamed(self, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
        """The whole part, of which one block is in memory at a time: each is read when it is called.

        Arguments as for `replay`.
        """
        model, left_out = self._parts.model, self._left_out
        blocks = [model.get_submodule(path) for path in left_out[: len(self.blocks)]]
        stubs: dict[int, object] = {**make_stubs(blocks, partial(self._run, device, dtype))}
        stubs |= {id(model.get_submodule(path)): LeftOut() for path in left_out[len(self.blocks) :]}
        real = real_copy(model, self._outside(device, dtype), device, stubs, self._dtypes_for(dtype))
        with freed_on_exit(real):
            yield real

    @contextmanager
    def whole(self, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
        """The whole part in memory; arguments as for `replay`."""
        model = self._parts.model
        tensors = self._gather(model.state_dict(), device, dtype)
        real = real_copy(model, tensors, device, {}, self._dtypes_for(dtype))
        del tensors
        with freed_on_exit(real):
            yield real

    @property
    def _left_out(self) -> list[str]:
        """Module paths that are not in memory all the time: the blocks, then whatever is never called."""
        return [block.module for block in self.blocks]

    def _settle(self, real: Any, recorders: Sequence[Recorder]) -> None:
        """Find out what the blocks return where that is not plain."""

    def _outside(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors outside of the blocks."""
        return self._gather(self._in_stem(self._left_out), device, dtype)

    def _run(
        self, device: torch.device, dtype: torch.dtype, index: int, names: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """One call of a block that is in memory for it."""
        del names
        with self.block(index, device, dtype) as block, torch.no_grad():
            return block(*args, **kwargs)
