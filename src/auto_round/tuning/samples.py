"""What a block is tuned on: inputs, the outputs it should give, and how to call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auto_round.facts.flow import States

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""A block's arguments beside the hidden states: further positional ones, and keyword arguments."""


Counts = tuple[Tensor, ...]
"""See `Batch.counts`."""


class Batch(NamedTuple):
    """Some samples as a loss takes them, all on the block's device.

    Attributes:
        inputs: what flows in.
        args: positional arguments behind it.
        kwargs: keyword arguments.
        targets: what the unquantized block gives.
        weights: of each of the targets `[batch, length]` float32, how much the error of each position counts,
            0 at padding; None where all count alike.
        counts: for each of the targets, the number of elements that its loss is divided by, a float32 scalar
            (see `counted_elements`). When a batch goes through the block in parts, it is that of the whole
            batch, so that the losses of the parts add up.
    """

    inputs: States
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: States
    weights: tuple[Tensor | None, ...]
    counts: Counts


def no_arguments(index: Sequence[int]) -> Arguments:
    """No further arguments: for blocks that take nothing but the hidden states."""
    return (), {}


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs and wanted outputs of one block, called as `block(*inputs, *args, **kwargs)`.

    Attributes:
        inputs: what flows in, each `[n, ..., width]`, one entry a sample; may live on the host.
        targets: outputs of the unquantized block, same layout.
        arguments: further arguments of the block for the given samples.
        weights: of each of the targets `[n, length]` float32, see `Batch`; None: all positions count alike.
            See `numerics.token_weights`.
        kind: of a sample: only those of one kind go through the block together; None: all do.
    """

    inputs: States
    targets: States
    arguments: Callable[[Sequence[int]], Arguments] = no_arguments
    weights: tuple[Tensor, ...] | None = None
    kind: Callable[[int], Hashable] | None = None

    def passes(self, index: Sequence[int], at_once: int) -> Iterator[Sequence[int]]:
        """Some samples cut into what goes through the block at once.

        Args:
            index: which ones.
            at_once: most samples of a pass.
        """
        for same in self._alike(index):
            for start in range(0, len(same), at_once):
                yield same[start : start + at_once]

    def _alike(self, index: Sequence[int]) -> Sequence[Sequence[int]]:
        if self.kind is None:
            return (index,)
        groups: dict[Hashable, list[int]] = {}
        for i in index:
            groups.setdefault(self.kind(i), []).append(i)
        return tuple(groups.values())

    def __len__(self) -> int:
        return int(self.inputs[0].shape[0])

    def counts(self, index: Sequence[int], device: torch.device) -> Counts:
        """`counted_elements` of each of the targets of some samples."""
        pick = torch.as_tensor(index, device="cpu")
        weights = self._weights_of(pick)
        shapes = [(len(index), *target.shape[1:]) for target in self.targets]
        return tuple(counted_elements(s, w, device) for s, w in zip(shapes, weights, strict=True))

    def batch(self, index: Sequence[int], counts: Counts, device: torch.device) -> Batch:
        """Some samples on a device.

        Args:
            index: which ones.
            counts: elements over which losses are means.
            device: where the block lives.
        """
        args, kwargs = self.arguments(index)
        pick = torch.as_tensor(index, device="cpu")
        return Batch(
            tuple(x[pick].to(device) for x in self.inputs),
            args,
            dict(kwargs),
            tuple(y[pick].to(device) for y in self.targets),
            tuple(None if w is None else w.to(device) for w in self._weights_of(pick)),
            counts,
        )

    def _weights_of(self, pick: Tensor) -> tuple[Tensor | None, ...]:
        if self.weights is None:
            return (None,) * len(self.targets)
        return tuple(w[pick] for w in self.weights)


def counted_elements(shape: Sequence[int], weights: Tensor | None, device: torch.device) -> Tensor:
    """Elements of `[batch, length, width]` at positions of any weight (one at least); float32 scalar."""
    if weights is None:
        return torch.full((), math.prod(shape), dtype=torch.float32, device=device)
    return ((weights > 0).sum().clamp_min(1) * shape[-1]).to(device, torch.float32)


def leaf(state: Tensor) -> Tensor:
    """A tensor apart from what made it, in which gradients are wanted, if it holds floats."""
    alone = state.detach()
    return alone.requires_grad_() if alone.is_floating_point() else alone


def states_of(output: Any, order: Sequence[int]) -> States:
    """What flows on, from a block's output: a tensor alone, or a tuple that holds it.

    Args:
        output: what a block returned.
        order: place in the output of each tensor that flows.

    Raises:
        TypeError: no tensor stands there.
    """
    parts = output if isinstance(output, (tuple, list)) else (output,)
    states = tuple(parts[i] for i in order if i < len(parts) and isinstance(parts[i], Tensor))
    if len(states) < len(order):
        raise TypeError(
            f"a block must return {len(order)} tensors that flow on, alone or in a tuple, got {type(output)}"
        )
    return states


def run_block(
    block: Callable[..., Any],
    samples: Samples,
    out: States,
    *,
    batch_size: int,
    rows: range | None = None,
    device: torch.device | None = None,
) -> None:
    """Write outputs of a block into `out`, each `[n, ..., width]`; no gradient.

    Args:
        block: called with what flows and `samples.arguments`.
        samples: inputs; `out` may be their storage.
        out: where the outputs go.
        batch_size: samples at a time.
        rows: samples to run; None for all.
        device: where the block lives; None for where the inputs live.
    """
    rows = range(len(samples)) if rows is None else rows
    with torch.no_grad():
        for index in samples.passes(rows, batch_size):
            args, kwargs = samples.arguments(index)
            pick = slice(index.start, index.stop) if isinstance(index, range) else list(index)
            states = [x[pick].to(device) for x in samples.inputs]
            found = states_of(block(*states, *args, **kwargs), range(len(out)))
            for to, state in zip(out, found, strict=True):
                to[pick] = state.to(to.device)
