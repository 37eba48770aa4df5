"""Short runs of the whole pipeline on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.reader import Checkpoint
from auto_round.config import build_options
from auto_round.log import Progress, ProgressSink, ignore_progress
from auto_round.pipeline.quantize import run
from auto_round.pipeline.result import Result
from auto_round.report.record import RUN_RECORD

SIZES = {"hidden_size": 64, "intermediate_size": 96}
"""Every matrix of a model of these sizes can be packed (multiples of 32)."""

SHORT: dict[str, Any] = {
    "group_size": 32,
    "iters": 2,
    "nsamples": 4,
    "seqlen": 16,
    "batch_size": 2,
    "device_map": "cpu",
    "not_use_best_mse": True,  # a few steps on random data make a block worse: keep them all the same
}


def token_rows(count: int = 14, length: int = 16, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (count, length), generator=generator).tolist()


ROWS = token_rows()


def quantize(
    model: Path | str,
    out: Path,
    *,
    dataset: Any = ROWS,
    progress: ProgressSink = ignore_progress,
    live: Any = None,
    **given: Any,
) -> Result:
    """Run the main job with few short rows and steps; `given` as for `build_options`."""
    options = build_options({**SHORT, "model": str(model), "output_dir": str(out), **given})
    return run(options, progress, model=live, dataset=dataset)


class Stop(Exception):  # noqa: N818  stands for a signal
    """The run is interrupted here."""


def stop_after(done: int, stage: str = "tune") -> ProgressSink:
    """Interrupts a run when so many steps of a stage are done."""

    def progress(event: Progress) -> None:
        if event.stage == stage and event.done == done:
            raise Stop

    return progress


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells of times."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != RUN_RECORD)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def weights(folder: Path) -> dict[str, Tensor]:
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names}


def kl_of(result: Result) -> dict[str, float]:
    return {name: figures["kl"] for name, figures in result.report["verified"].items()}
