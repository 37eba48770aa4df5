"""Activation streams: hidden states of all rows between two blocks, with and without quantization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.checkpoint.disk import reserve, writing
from auto_round.config.groups import MemoryOptions

SPILL_BYTES = 2 << 30
"""Both streams above this size are backed by files where they lie on the host, unless `low_cpu_mem_usage` is
off."""


class Home(NamedTuple):
    """Where hidden states lie between two blocks.

    Attributes:
        device: the accelerator, or the host.
        files: whether files back them.
    """

    device: torch.device
    files: bool


def home_of_streams(memory: MemoryOptions, device: torch.device, nbytes: int) -> Home:
    """Where the streams of a run lie.

    Args:
        memory: what the user asked for.
        device: where blocks run.
        nbytes: of both streams.
    """
    if device.type != "cpu" and not memory.low_gpu_mem_usage:
        return Home(device, files=False)
    return Home(torch.device("cpu"), memory.low_cpu_mem_usage and nbytes > SPILL_BYTES)


class Streams:
    """Hidden states `[rows, length, width]` of the unquantized and of the quantized model.

    Both, and the targets of the block at hand, lie in memory, or in files that the system may write back
    (`spill`); a copy of the streams on disk lets a killed run continue. Rows `0 ... tuned - 1` are tuned on;
    the rest are held out.

    Attributes:
        reference: what the unquantized blocks so far give.
        quantized: what the quantized blocks so far give.
        targets: room for what the next unquantized block gives, of the same shape.
        tuned: rows that are tuned on.
        masks: `[rows, length]` bool, True where a position counts; None where all do.
    """

    def __init__(
        self,
        reference: Tensor,
        quantized: Tensor,
        targets: Tensor,
        tuned: int,
        masks: Tensor | None = None,
    ) -> None:
        self.reference = reference
        self.quantized = quantized
        self.targets = targets
        self.tuned = tuned
        self.masks = masks

    @property
    def rows(self) -> int:
        """All rows, held-out ones included."""
        return int(self.reference.shape[0])

    @classmethod
    def begin(
        cls,
        hidden: Sequence[Tensor],
        tuned: int,
        *,
        device: torch.device,
        masks: Tensor | None = None,
        spill: Path | None = None,
    ) -> Streams:
        """Both streams start as the embeddings.

        Args:
            hidden: `[1, length, width]` for each row.
            tuned: rows that are tuned on.
            masks: `[rows, length]` bool; None where every position counts.
            device: where the streams live when they are not spilled.
            spill: folder for files that back the streams; None keeps them in memory.
        """
        shape = (len(hidden), *hidden[0].shape[1:])
        reference, quantized, targets = (
            _storage(shape, hidden[0].dtype, device, spill, name)
            for name in ("reference", "quantized", "targets")
        )
        for i, row in enumerate(hidden):
            reference[i] = quantized[i] = row[0]
        return cls(reference, quantized, targets, tuned, masks)

    def save(self, path: Path) -> None:
        """Write both streams; complete or not at all."""
        save_tensors(path, {"reference": self.reference.cpu(), "quantized": self.quantized.cpu()})

    def restore(self, path: Path) -> None:
        """Overwrite both streams with saved ones of the same shape."""
        saved = load_tensors(path)
        self.reference.copy_(saved["reference"])
        self.quantized.copy_(saved["quantized"])


def _storage(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, spill: Path | None, name: str
) -> Tensor:
    if spill is None:
        return torch.empty(*shape, dtype=dtype, device=device)
    count = 1
    for n in shape:
        count *= n
    path = spill / f"{name}.stream"
    with writing(path), path.open("wb") as file:
        reserve(file.fileno(), count * dtype.itemsize)  # a full disk must not surface while memory is written
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).reshape(*shape)
