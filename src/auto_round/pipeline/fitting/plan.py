"""The memory plan of a run: what it holds in each of its stages, on the host and on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from auto_round.pipeline.fitting.level import MemoryLevel
from auto_round.units import size

STREAMS = "hidden states"
"""Part of a stage that may lie in files."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What one stage of a run holds at its peak.

    Attributes:
        name: "smooth", "trace", "tune", "all blocks", "measure", "verify", or "round" without data.
        host: part -> bytes of host memory.
        device: part -> bytes on the accelerator; empty where blocks are tuned on the host.
        others: further device -> bytes, where matrices of blocks are placed on several.
    """

    name: str
    host: Mapping[str, int]
    device: Mapping[str, int]
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def host_bytes(self) -> int:
        """Host memory of all parts."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """Memory of all parts on the accelerator."""
        return sum(self.device.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run will need, made before its first block from the configuration and the headers of its files.

    Attributes:
        levels: ways to run, from most memory to least.
        chosen: which of them the run begins with.
        stages: what it then holds, stage by stage.
        held: host memory that the process held when the plan was made, bytes: Python, PyTorch, the tokenizer.
        files: the level wants hidden states in host memory, and they go to files, for which there is room.
        host_room: host memory that was free then, bytes; 0 where the system does not tell.
        device_room: memory of the accelerator in all, bytes; 0 on the host and where nobody tells.
    """

    levels: tuple[MemoryLevel, ...]
    chosen: int
    stages: tuple[StageMemory, ...]
    held: int
    files: bool
    host_room: int
    device_room: int

    @property
    def level(self) -> MemoryLevel:
        """How the run begins."""
        return self.levels[self.chosen]

    @property
    def host_stage(self) -> StageMemory:
        """The stage that needs most host memory."""
        return max(self.stages, key=lambda stage: stage.host_bytes)

    @property
    def device_stage(self) -> StageMemory:
        """The stage that needs most memory on the accelerator."""
        return max(self.stages, key=lambda stage: stage.device_bytes)

    @property
    def host_bytes(self) -> int:
        """Expected peak of the process's resident memory."""
        return self.held + self.host_stage.host_bytes

    @property
    def device_bytes(self) -> int:
        """Expected peak on the accelerator; 0 where there is none."""
        return self.device_stage.device_bytes

    @property
    def beside_streams(self) -> int:
        """Host memory of the largest stage without hidden states: files give theirs back."""
        return max(stage.host_bytes - stage.host.get(STREAMS, 0) for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether host and accelerator have as much, as far as they tell."""
        needed = self.beside_streams if self.files else self.host_stage.host_bytes
        host = not self.host_room or needed <= self.host_room
        return host and (not self.device_room or self.device_bytes <= self.device_room)

    @property
    def line(self) -> str:
        """The plan in one line."""
        text = f"about {size(self.host_bytes)} of host memory at the peak ({self.host_stage.name})"
        if self.device_bytes:
            text += f", {size(self.device_bytes)} on the device ({self.device_stage.name})"
        where = f"{self.level.text}{', which go to files' if self.files else ''}"
        return f"{text}: {where}"

    @property
    def table(self) -> str:
        """Stages and parts for people, a line for each stage and place."""
        lines = [f"  {'held before':12} {size(self.held)}"]
        for stage in self.stages:
            for place, parts in (("", stage.host), (" (device)", stage.device)):
                if shown := [f"{name} {size(count)}" for name, count in parts.items() if count]:
                    total = size(sum(parts.values()))
                    lines.append(f"  {stage.name + place:12} {total}: {', '.join(shown)}")
            if stage.others:
                there = ", ".join(f"{device} {size(count)}" for device, count in stage.others.items())
                lines.append(f"  {stage.name:12} other devices: {there}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, for the record of the run."""
        stages = {s.name: {"host": dict(s.host), "device": dict(s.device), **_others(s)} for s in self.stages}
        return {
            "host_bytes": self.host_bytes,
            "device_bytes": self.device_bytes,
            "held": self.held,
            "level": self.level.text,
            "files": self.files,
            "stages": stages,
        }


def _others(stage: StageMemory) -> dict[str, dict[str, int]]:
    """Further devices, in the form of the others."""
    return {device: {"weights": count} for device, count in stage.others.items()}
