"""A job: everything decided before the first weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.calibration.row import CalibrationRow
from auto_round.calibration.rows import CalibrationRows
from auto_round.checkpoint.shards import TRANSFORMERS, WeightFiles
from auto_round.config.memory import MemoryOptions
from auto_round.config.options import Options
from auto_round.errors import InternalError
from auto_round.export.exporter import Exporter
from auto_round.facts.layer import Layer
from auto_round.models.source import ModelSource
from auto_round.numerics.format import Format
from auto_round.numerics.rule import Effort
from auto_round.numerics.search import THOROUGH
from auto_round.pipeline.deciding.kept_dtype import named_dtype
from auto_round.pipeline.deciding.method import Method, method_of
from auto_round.pipeline.deciding.placement import Placement
from auto_round.pipeline.deciding.smoothing import Smoothing
from auto_round.pipeline.fitting.level import MemoryLevel, levels_of, starts_at
from auto_round.pipeline.fitting.plan import MemoryPlan
from auto_round.ranks.ranks import ALONE, Ranks
from auto_round.schemes.attention import AttentionPlan
from auto_round.schemes.plan import Plan
from auto_round.tuning.config import TuneConfig


@dataclass(frozen=True, slots=True)
class Job:
    """One quantization run, ready to start.

    What drives a run (`quantize`, `dry_run`) reads `options`; everything below takes the values it needs.

    Attributes:
        options: what the user asked for.
        source: the model.
        tokenizer: its tokenizer; None when no calibration text was needed and none was given.
        plan: what becomes of every layer.
        exporters: output format name -> exporter with its variant decided.
        rows: calibration rows, those held out last; None for plain rounding without data.
        tuned: how many of the rows are tuned on; the rest are held out.
        tune: settings of the tuning loop.
        device: where blocks are tuned, but for what is placed elsewhere.
        dtype: dtype in which blocks run.
        output: folder of the result.
        importance: tensor in the source -> mean square of its inputs `[in]`, from a file; empty without one.
        more_rows: loads so many rows of the calibration data; None where there are none.
        processor: its processor for images, where it was given as an object.
        caches: which scales of the key/value cache and of attention are calibrated; None for none.
        placement: which matrices are tuned on other devices; None for none.
        free: further accelerators that the run may use, where which is left to it.
        ahead: where the next blocks' targets are computed while others are tuned; None for not at all.
        memory_plan: what the run needs where, and how it begins; None before that is decided.
        ranks: the processes that do it together.
        files: how weight files of the output are called.
        fresh: rows of the stage after block tuning, which blocks are not tuned on; empty without it.
        smoothing: how `source` was rescaled; None where it is as the user gave it.
    """

    options: Options
    source: ModelSource
    tokenizer: Any
    plan: Plan
    exporters: Mapping[str, Exporter]
    rows: CalibrationRows | None
    tuned: int
    tune: TuneConfig
    device: torch.device
    dtype: torch.dtype
    output: Path
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    more_rows: Callable[[int], CalibrationRows] | None = None
    processor: Any = None
    caches: AttentionPlan | None = None
    placement: Placement | None = None
    free: tuple[torch.device, ...] = ()
    ahead: torch.device | None = None
    memory_plan: MemoryPlan | None = None
    ranks: Ranks = ALONE
    files: WeightFiles = TRANSFORMERS
    fresh: tuple[CalibrationRow, ...] = ()
    smoothing: Smoothing | None = None

    @property
    def effort(self) -> Effort | None:
        """Range search of optimized RTN; None for plain rounding."""
        return THOROUGH if self.tune.search else None

    @property
    def tunes(self) -> bool:
        """Some rows are there to tune on, to weigh a search by, or to calibrate inputs."""
        return self.rows is not None and self.tuned > 0

    @property
    def all_rows(self) -> tuple[CalibrationRow, ...]:
        """Calibration rows, those held out last; none for plain rounding without data."""
        return () if self.rows is None else self.rows.rows

    @property
    def held_out(self) -> tuple[CalibrationRow, ...]:
        """Rows that choose the step that is kept, and measure the result."""
        return self.all_rows[self.tuned :]

    @property
    def judged_apart(self) -> bool:
        """Rows that measure the result are not tuned on; False where the data has one row only."""
        tuned = self.all_rows[: self.tuned]
        return not any(row in tuned for row in self.held_out)

    def on_rows(self, rows: Sequence[CalibrationRow]) -> Job:
        """The same run on these rows only, none of them held out.

        Raises:
            InternalError: it is a run without data.
        """
        if self.rows is None:
            raise InternalError("a run without data has no rows to replace")
        return replace(self, rows=replace(self.rows, rows=tuple(rows)), tuned=len(rows))

    @property
    def saves_imatrix(self) -> bool:
        """Importances of inputs are written to a file at the end."""
        return self.options.output.save_imatrix is not None

    @property
    def method(self) -> Method:
        """How the model is quantized, in words."""
        done = self.smoothing
        strength = done.strength if done is not None and done.tensors else 0.0
        return method_of(self.options, self.tune, with_rows=self.tunes, strength=strength)

    @property
    def memory(self) -> MemoryOptions:
        """What to save memory at the cost of time."""
        return self.options.memory

    def device_of(self, layer: Layer) -> torch.device:
        """Where a layer is worked on."""
        return self.device if self.placement is None else self.placement.of(layer)

    @property
    def levels(self) -> tuple[MemoryLevel, ...]:
        """How the run begins and goes on where memory ends: as planned, else as the options say."""
        if self.memory_plan is not None:
            return self.memory_plan.levels[self.memory_plan.chosen :]
        return self.levels_for(self.options.calibration.seqlen)

    @property
    def level(self) -> MemoryLevel:
        """How the run begins."""
        return self.levels[0]

    def levels_for(self, length: int) -> tuple[MemoryLevel, ...]:
        """The same for rows of another length, as far as the options say."""
        levels = levels_of(self.device, self.tune.batch_size, length)
        return levels[starts_at(levels, self.memory) :]

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """Dtype of what output folders keep, and from which weights are rounded; None for the model's own."""
        return named_dtype(self.options.model.model_dtype)

    @property
    def largest_shard(self) -> int:
        """Bytes of the largest weight file."""
        return self.options.output.max_shard_size

    @property
    def trusts_code(self) -> bool:
        """Code that lies in the model's folder may be run."""
        return self.options.model.trust_remote_code

    def quantized(self) -> dict[str, tuple[Layer, Format]]:
        """Layers to quantize, by name, with their formats."""
        found: dict[str, tuple[Layer, Format]] = {}
        for layer in self.source.layers:
            fmt = self.plan.format_of(layer.name)
            if fmt is not None:
                found[layer.name] = (layer, fmt)
        return found

    def folders(self, root: Path) -> dict[str, Path]:
        """Folder of each output format under `root`: `root` itself when there is only one."""
        if len(self.exporters) == 1:
            return dict.fromkeys(self.exporters, root)
        return {name: root / folder_of(name) for name in self.exporters}


def folder_of(format_name: str) -> str:
    """Name of a format's folder where there are several."""
    return format_name.replace(":", "-")
