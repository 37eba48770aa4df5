"""Steps from much memory to little: each changes where something lies or how it is computed, never what."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from auto_round.config.memory import MemoryOptions
from auto_round.pipeline.machine.device import rows_at_once


class StreamPlace(Enum):
    """Where hidden states lie between two blocks."""

    DEVICE = "on the device"
    HOST = "in host memory"
    FILES = "in files"


@dataclass(frozen=True, slots=True)
class MemoryLevel:
    """One way to run, with less memory than the one before it.

    Attributes:
        rows: most rows that go through a block at once; 0 for whole batches. It changes the order in which
            gradients are added, and so their last bits; nothing else here changes any.
        streams: where hidden states lie. Host memory that is too small for them is replaced by files. Where
            an accelerator has no room for them, it keeps no blocks while all are tuned together
            (`states.staying_units`): that changes last bits, too.
        rounds_again: weights are rounded a second time in the backward pass instead of keeping what it needs.
    """

    rows: int
    streams: StreamPlace
    rounds_again: bool = False

    @property
    def text(self) -> str:
        """The level for people."""
        rows = "whole batches" if not self.rows else f"{self.rows} row{'s' * (self.rows > 1)} at once"
        again = ", weights rounded twice" if self.rounds_again else ""
        return f"{rows}, activations {self.streams.value}{again}"


def levels_of(device: torch.device, batch: int, length: int) -> tuple[MemoryLevel, ...]:
    """All levels of a run, from most memory to least.

    Args:
        device: where blocks are tuned.
        batch: rows of a whole batch.
        length: tokens in a row.
    """
    most = rows_at_once(device, length)
    if device.type == "cpu":
        found = [MemoryLevel(most, StreamPlace.HOST), MemoryLevel(most, StreamPlace.HOST, rounds_again=True)]
    else:
        halves = [batch >> i for i in range(1, batch.bit_length())]
        found = [
            MemoryLevel(most, StreamPlace.DEVICE),
            *(MemoryLevel(rows, StreamPlace.HOST) for rows in (most, *halves)),
        ]
    last = [MemoryLevel(1, place, rounds_again=True) for place in (StreamPlace.HOST, StreamPlace.FILES)]
    return tuple(dict.fromkeys([*found, *last]))


def starts_at(levels: tuple[MemoryLevel, ...], memory: MemoryOptions) -> int:
    """The first level that the user's options allow."""
    if memory.memory == "lowest":
        return len(levels) - 1
    if memory.memory == "low":
        return len(levels) - 2
    if memory.low_gpu_mem_usage:
        return next((i for i, level in enumerate(levels) if level.rows == 1), 0)
    return 0
