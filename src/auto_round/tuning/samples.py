"""What a block is tuned on: inputs, the outputs it should give, and how to call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BlockCall = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional arguments after the hidden states, and keyword arguments."""


def no_arguments(index: Sequence[int]) -> BlockCall:
    """For blocks that take nothing but hidden states."""
    return (), {}


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs and wanted outputs of one block.

    Attributes:
        inputs: hidden states `[n, ..., hidden]`, one entry a sample; may live on the host.
        targets: outputs of the unquantized block, same layout.
        arguments: further arguments of the block for the given samples.
        weights: `[n, length]` float32, how much the error of each position counts, 0 at padding; None: all
            alike. See `numerics.token_weights`.
    """

    inputs: Tensor
    targets: Tensor
    arguments: Callable[[Sequence[int]], BlockCall] = no_arguments
    weights: Tensor | None = None

    def __len__(self) -> int:
        return int(self.inputs.shape[0])


def first_output(output: Any) -> Tensor:
    """Hidden states of a block's output: blocks return them alone or first in a tuple."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise TypeError(f"a block must return a tensor or a tuple that begins with one, got {type(hidden)}")
    return hidden


def run_block(
    block: Callable[..., Any],
    samples: Samples,
    out: Tensor,
    *,
    batch_size: int,
    rows: range | None = None,
    device: torch.device | None = None,
) -> None:
    """Write outputs of a block into `out`, `[n, ..., hidden]`; no gradient.

    Args:
        block: called with hidden states and `samples.arguments`.
        samples: inputs; `out` may be their storage.
        out: where the outputs go.
        batch_size: samples at a time.
        rows: samples to run; None for all.
        device: where the block lives; None for where the inputs live.
    """
    rows = range(len(samples)) if rows is None else rows
    with torch.no_grad():
        for start in range(rows.start, rows.stop, batch_size):
            end = min(start + batch_size, rows.stop)
            args, kwargs = samples.arguments(range(start, end))
            hidden = samples.inputs[start:end].to(device)
            out[start:end] = first_output(block(hidden, *args, **kwargs)).to(out.device)
