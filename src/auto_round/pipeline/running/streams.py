"""Activation streams: what flows between two blocks for all rows, with and without quantization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.checkpoint.disk import reserve, writing
from auto_round.config.memory import MemoryOptions
from auto_round.facts.flow import States
from auto_round.pipeline.fitting.choose import wants_files
from auto_round.pipeline.fitting.level import MemoryLevel, StreamPlace
from auto_round.pipeline.machine.memory import available_bytes

SAVED_AS = 2
"""Version of the files that streams are saved in; a run with files of another version is not continued."""


class Home(NamedTuple):
    """Where hidden states lie between two blocks.

    Attributes:
        device: the accelerator, or the host.
        files: whether files back them.
    """

    device: torch.device
    files: bool


def home_of_streams(
    level: MemoryLevel, memory: MemoryOptions, device: torch.device, nbytes: int, beside: int = 0
) -> Home:
    """Where the streams of a run lie.

    Args:
        level: how much memory the run may take.
        memory: what the user asked for.
        device: where blocks run.
        nbytes: of all of them, with the targets.
        beside: host memory that the run needs beside them, bytes.
    """
    if device.type != "cpu" and level.streams is StreamPlace.DEVICE:
        return Home(device, files=False)
    free = available_bytes()
    return Home(torch.device("cpu"), wants_files(level, memory, nbytes, free - beside if free else None))


class Streams:
    """What flows between two blocks for all rows, in the unquantized and in the quantized model.

    One tensor `[rows, length, width]` for each of the `States`. Both streams, and the targets of the block at
    hand, lie in memory, or in files that the system may write back (`spill`); a copy of the streams on disk
    lets a killed run continue. Rows `0 ... tuned - 1` are tuned on; the rest are held out.

    Attributes:
        reference: what the unquantized blocks so far give.
        quantized: what the quantized blocks so far give.
        targets: room for what the next unquantized block gives, of the same shapes.
        tuned: rows that are tuned on.
        masks: `[rows, length]` bool, True where a position of the first tensor counts; None where all do.
        between: False while the quantized stream is being replaced, so that a part of it is of each block.
    """

    def __init__(
        self, reference: States, quantized: States, targets: States, tuned: int, masks: Tensor | None = None
    ) -> None:
        self.reference = reference
        self.quantized = quantized
        self.targets = targets
        self.tuned = tuned
        self.masks = masks
        self.between = True

    @property
    def rows(self) -> int:
        """All rows, held-out ones included."""
        return int(self.reference[0].shape[0])

    def mask_of(self, position: int) -> Tensor | None:
        """Which positions of a tensor count: the rows' masks for the first, all of the others."""
        return self.masks if position == 0 else None

    @classmethod
    def begin(
        cls,
        rows: Sequence[States],
        tuned: int,
        *,
        device: torch.device,
        masks: Tensor | None = None,
        spill: Path | None = None,
    ) -> Streams:
        """Both streams start as what flows into the first block.

        Args:
            rows: for each row its tensors, `[1, length, width]`.
            tuned: rows that are tuned on.
            masks: `[rows, length]` bool; None where every position counts.
            device: where the streams live when they are not spilled.
            spill: folder for files that back the streams; None keeps them in memory.
        """
        reference, quantized, targets = (
            tuple(
                storage((len(rows), *state.shape[1:]), state.dtype, device, spill, f"{name}-{position}")
                for position, state in enumerate(rows[0])
            )
            for name in ("reference", "quantized", "targets")
        )
        streams = cls(reference, quantized, targets, tuned, masks)
        for i, row in enumerate(rows):
            for to, state in zip(reference, row, strict=True):
                to[i] = state[0]
            streams.restart(i, row)
        return streams

    def row(self, row: int) -> tuple[States, States]:
        """Reference and quantized tensors of one row, `[1, length, width]`."""
        reference, quantized = (
            tuple(state[row : row + 1] for state in states) for states in (self.reference, self.quantized)
        )
        return reference, quantized

    def restart(self, row: int, states: States) -> None:
        """Overwrite one row of the quantized stream, where it begins elsewhere; `[1, length, width]` each."""
        for to, state in zip(self.quantized, states, strict=True):
            to[row] = state[0]

    def advance(self) -> None:
        """The targets become the reference."""
        for to, state in zip(self.reference, self.targets, strict=True):
            to.copy_(state)

    def move(self, home: Home, spill: Path) -> None:
        """Let everything lie elsewhere from now on; the targets start empty.

        Args:
            home: where.
            spill: folder for files.
        """
        self.targets = ()
        moved = []
        for name, states in (("reference", self.reference), ("quantized", self.quantized)):
            there = room_like(states, name, home, spill)
            for to, state in zip(there, states, strict=True):
                to.copy_(state)
            moved.append(there)
        self.reference, self.quantized = moved
        self.targets = room_like(self.reference, "targets", home, spill)

    def save(self, path: Path) -> None:
        """Write both streams; complete or not at all."""
        save_tensors(path, {name: state.cpu() for name, state in self._named().items()})

    def restore(self, path: Path) -> None:
        """Overwrite both streams with saved ones of the same shapes."""
        saved = load_tensors(path)
        for name, state in self._named().items():
            state.copy_(saved[name])

    def _named(self) -> dict[str, Tensor]:
        both = {"reference": self.reference, "quantized": self.quantized}
        return {f"{name}.{i}": state for name, states in both.items() for i, state in enumerate(states)}


def room_like(states: States, name: str, home: Home, spill: Path) -> States:
    """Room for tensors like these, to be filled.

    Args:
        states: of equal shapes and dtypes.
        name: of files, without the number of a tensor and their ending.
        home: where they will lie.
        spill: folder for files, where `home` has some.
    """
    folder = spill if home.files else None
    return tuple(
        storage(state.shape, state.dtype, home.device, folder, f"{name}-{position}")
        for position, state in enumerate(states)
    )


def storage(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, spill: Path | None, name: str
) -> Tensor:
    """A tensor for hidden states, its numbers not set yet; in memory or backed by a file.

    Args:
        shape: of the tensor.
        dtype: of its numbers.
        device: where it lies when it is not spilled.
        spill: folder for a file that backs it; None keeps it in memory.
        name: of that file, without its ending.
    """
    if spill is None:
        return torch.empty(*shape, dtype=dtype, device=device)
    count = 1
    for n in shape:
        count *= n
    spill.mkdir(parents=True, exist_ok=True)
    path = spill / f"{name}.stream"
    with writing(path), path.open("wb") as file:
        reserve(file.fileno(), count * dtype.itemsize)  # a full disk must not surface while memory is written
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).reshape(*shape)
