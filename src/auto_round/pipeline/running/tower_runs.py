"""Runs through the blocks of an encoder: what each block is called with, and what flows into the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import UnsupportedError
from auto_round.facts.flow import BlockCall, Flow, States, split_call
from auto_round.models.earlier_results import untraceable
from auto_round.models.families import parameter_names
from auto_round.models.source import Edits
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.tuning.samples import states_of


@dataclass(slots=True)
class TowerRun:
    """One run through a list of blocks: all images of a row, or one of them.

    Attributes:
        begun: what flows into the first block.
        calls: one entry per block.
        last: what the last of them handed on.
    """

    begun: Tensor
    calls: list[BlockCall]
    last: Tensor | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what flows, `[..., patches, width]`, the same before and behind each block."""
        return tuple(self.begun.shape)

    @property
    def length(self) -> int:
        """Patches of all images."""
        return self.begun.numel() // self.begun.shape[-1]

    def state(self, length: int, dtype: torch.dtype) -> States:
        """What flows into the first block as streams keep it: `[1, length, width]`, padding behind."""
        flat = self.begun.reshape(-1, self.begun.shape[-1]).to(dtype)
        return (nn.functional.pad(flat, (0, 0, 0, length - len(flat)))[None],)


@contextmanager
def watch_runs(blocks: Sequence[nn.Module], flows: Sequence[Flow]) -> Iterator[list[TowerRun]]:
    """Note every run through some blocks while the context lasts.

    Args:
        blocks: a list of blocks with their weights, inside a model.
        flows: what each takes and returns.

    Yields:
        The runs so far, filled while the model runs.

    Raises:
        UnsupportedError: while the model runs: the blocks cannot be run one by one.
    """
    runs: list[TowerRun] = []
    with ExitStack() as stack:
        for index, (block, flow) in enumerate(zip(blocks, flows, strict=True)):
            watcher = _Watcher(runs, index, flow, parameter_names(block))
            stack.callback(block.register_forward_pre_hook(watcher.before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(watcher.behind).remove)
        yield runs


@dataclass(frozen=True, slots=True)
class _Watcher:
    """Sees the calls of one block."""

    runs: list[TowerRun]
    index: int
    flow: Flow
    parameters: Sequence[str]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a block is called with; block 0 begins a run of the encoder."""
        del module
        try:
            (state,), call = split_call(self.flow.taken, self.parameters, args, kwargs)
        except (LookupError, ValueError) as error:
            raise untraceable(str(error)) from error
        if self.index == 0:
            self.runs.append(TowerRun(state.detach().clone(), []))
        run = self.runs[-1] if self.runs else None
        if run is None or len(run.calls) != self.index:
            raise untraceable(f"block {self.index} of an encoder is not called behind block {self.index - 1}")
        if tuple(state.shape) != run.shape:
            raise untraceable(f"what flows changes its shape before block {self.index} of an encoder")
        if run.last is not None and not torch.equal(run.last, state):
            raise untraceable(f"an encoder changes what flows before block {self.index}")
        run.calls.append(replace(call, shape=run.shape, lengths=(run.length,)))

    def behind(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what was handed on."""
        del module, args
        self.runs[-1].last = states_of(output, self.flow.order)[0].detach().clone()


def table_of(runs: Sequence[TowerRun]) -> ArgumentTable:
    """Arguments of all blocks for each run."""
    table = ArgumentTable(alone=True)
    nothing: Edits = (None,)
    for run in runs:
        table.add(run.calls, [nothing] * len(run.calls))
    return table


def refuse_other_lengths(runs: Sequence[TowerRun], count: int) -> None:
    """Refuse runs that left blocks out, and none at all.

    Raises:
        UnsupportedError: there are such runs.
    """
    if not runs:
        raise UnsupportedError("no row reaches this encoder")
    if any(len(run.calls) != count for run in runs):
        raise untraceable("some images do not go through all blocks of an encoder")


def masks_of_runs(runs: Sequence[TowerRun]) -> Tensor | None:
    """`[runs, length]` bool, True for patches; None where all runs are equally long."""
    lengths = torch.tensor([run.length for run in runs], dtype=torch.int64, device="cpu")
    longest = int(lengths.max())
    if bool((lengths == longest).all()):
        return None
    return torch.arange(longest, device="cpu") < lengths[:, None]
