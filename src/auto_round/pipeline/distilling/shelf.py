"""What is learned of each unit of blocks, and the optimizer's moments: in memory, or in files.

A state of step `n` is one of the whole model. The shelf always has the files of the last durable step, so
that a killed run goes on from there, and those of the best one. What is put after it lies beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.checkpoint.disk import atomic_write_json, reading, sync_file, sync_folder, writing

LEARNED, MOMENTS = "learned", "moments"
"""The two kinds of tensors. Only the first is needed to run the blocks."""
CONSTANTS = "constants"
"""Folder of what no step changes."""
_PROGRESS = "progress.json"


class Shelf:
    """What is learned of all units, the moments of the optimizer, and how far the steps are.

    Attributes:
        folder: where the files lie.
        units: how many units there are.
    """

    def __init__(self, folder: Path, units: int, *, in_memory: bool) -> None:
        """Open what an earlier run left, or what block tuning put there with `begin`.

        Args:
            folder: made when something is put.
            units: how many units there are.
            in_memory: keep the states at hand in memory; files are written when they are made durable.
        """
        self.folder, self.units, self._in_memory = folder, units, in_memory
        self._held: dict[tuple[int, str], Mapping[str, Tensor]] = {}
        self.progress: dict[str, Any] = {}
        if (folder / _PROGRESS).exists():
            with reading(folder / _PROGRESS):
                self.progress = json.loads((folder / _PROGRESS).read_bytes())
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        durable = int(self.progress.get("step", 0))
        self._steps = {(u, k): durable for u in range(units) for k in (LEARNED, MOMENTS)}

    def load(self, unit: int, kind: str) -> dict[str, Tensor]:
        """Tensors of a unit as they are now, on the host; who changes them puts them back."""
        held = self._held.get((unit, kind))
        if held is not None:
            return dict(held)
        path = self._path(unit, kind, self._steps[unit, kind])
        return load_tensors(path) if path.exists() else {}

    def put(self, unit: int, kind: str, tensors: Mapping[str, Tensor], step: int) -> None:
        """Replace tensors of a unit; they are those behind a step."""
        here = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        if self._in_memory:
            self._held[unit, kind] = here
            self._steps[unit, kind] = step
            return
        save_tensors(self._path(unit, kind, step), here, durable=False)
        before, self._steps[unit, kind] = self._steps[unit, kind], step
        if before not in (step, *self._kept()):
            self._path(unit, kind, before).unlink(missing_ok=True)

    def constants(self, unit: int) -> dict[str, Tensor]:
        """What no step changes of a unit; nothing where there is none."""
        path = _constants(self.folder, unit)
        return load_tensors(path) if path.exists() else {}

    def make_durable(self, step: int, progress: Mapping[str, Any]) -> None:
        """Go on from here after a kill; drop what is needed no more.

        Args:
            step: steps taken.
            progress: what to find again in `progress`, JSON values; `best` is the step of the states to keep.
        """
        for (unit, kind), tensors in self._held.items():
            save_tensors(self._path(unit, kind, step), tensors)
        if not self._in_memory:
            with writing(self.folder):
                for path in self.folder.glob(f"*-{step:06d}.safetensors"):
                    sync_file(path)
                sync_folder(self.folder)
        self.progress = {**progress, "step": step}
        atomic_write_json(self.folder / _PROGRESS, self.progress)
        self._tidy()

    def take_best(self) -> None:
        """Let `load` give the best states from now on."""
        self._held.clear()
        self._steps = dict.fromkeys(self._steps, int(self.progress["best"]))

    def _tidy(self) -> None:
        """Remove files of other steps than those kept; of the best one moments are needed no more."""
        with writing(self.folder):
            for path in self.folder.glob("*.safetensors"):
                _, kind, step = path.stem.split("-")
                if int(step) not in self._kept() or (kind == MOMENTS and int(step) != self.progress["step"]):
                    path.unlink()

    def _kept(self) -> tuple[int, int]:
        return int(self.progress.get("step", 0)), int(self.progress.get("best", 0))

    def _path(self, unit: int, kind: str, step: int) -> Path:
        return self.folder / f"{unit:04d}-{kind}-{step:06d}.safetensors"


def begin(folder: Path, unit: int, learned: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
    """Put what block tuning learned of a unit where the stage will look for it.

    Args:
        folder: of the shelf.
        unit: its number.
        learned: what the stage goes on with.
        constants: what is the same at all steps; nothing where all is learned.
    """
    with writing(folder):
        (folder / CONSTANTS).mkdir(parents=True, exist_ok=True)
    if constants:
        save_tensors(_constants(folder, unit), constants)
    save_tensors(folder / f"{unit:04d}-{LEARNED}-{0:06d}.safetensors", learned)


def _constants(folder: Path, unit: int) -> Path:
    return folder / CONSTANTS / f"{unit:04d}.safetensors"
