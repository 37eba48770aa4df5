"""Activation streams: hidden states of all rows between two blocks, with and without quantization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.checkpoint.disk import reserve, writing


class Streams:
    """Hidden states `[rows, length, width]` of the unquantized and of the quantized model.

    Both lie in memory, or in files that the system may write back (`spill`); a copy on disk lets a killed
    run continue. Rows `0 ... tuned - 1` are tuned on; the rest are held out.

    Attributes:
        reference: what the unquantized blocks so far give.
        quantized: what the quantized blocks so far give.
        tuned: rows that are tuned on.
        masks: `[rows, length]` bool, True where a position counts; None where all do.
    """

    def __init__(self, reference: Tensor, quantized: Tensor, tuned: int, masks: Tensor | None = None) -> None:
        self.reference = reference
        self.quantized = quantized
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
        pair = [_storage(shape, hidden[0].dtype, device, spill, name) for name in ("reference", "quantized")]
        for stream in pair:
            for i, row in enumerate(hidden):
                stream[i] = row[0]
        return cls(pair[0], pair[1], tuned, masks)

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
