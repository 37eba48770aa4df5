"""The check that a written component loads with diffusers, and predicts what the tuned one predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from auto_round.diffusion.rows import RecordedRows
from auto_round.diffusion.tune_component import Held
from auto_round.errors import CheckpointError
from auto_round.inference.load_folder import failures
from auto_round.models.pipeline_folder import quiet_diffusers
from auto_round.models.replay_stem import first_tensor, placed
from auto_round.numerics.activation import ActivationFormat
from auto_round.pipeline.deciding.activations import activation_formats
from auto_round.pipeline.deciding.job import Job
from auto_round.tuning.quantized_inputs import quantized_inputs

LARGEST_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Squared difference over squared prediction that arithmetic in another order may cause, by dtype."""
LARGEST_ERROR_INPUTS = 1e-3
"""The same where inputs are rounded: one that lies between two numbers may come to the other one."""


def check_reload(
    job: Job,
    kind: Any,
    folder: Path,
    tuned: tuple[RecordedRows, Held] | None,
    inputs: Mapping[str, ActivationFormat],
) -> dict[str, Any]:
    """Load a component as users do, and compare its predictions.

    Args:
        job: the run of the component.
        kind: its class.
        folder: what was written.
        tuned: what it is called with, and what the tuned component predicts; None without rows.
        inputs: module -> what its input has to be rounded to here, where the folder does not say so.

    Returns:
        `error` of its predictions and how many `rows` they were for; `loaded` alone without rows.

    Raises:
        CheckpointError: it does not load, or predicts something else.
    """
    model = _load(job, kind, folder)
    if tuned is None:
        return {"loaded": True}
    rows, held = tuned
    difference = size = 0.0
    for number, wanted in held.outputs.items():
        with torch.no_grad(), quantized_inputs(model, inputs):
            found = first_tensor(model(**placed(rows.read(number), job.device, job.dtype))).cpu().double()
        difference += float((found - wanted.double()).square().sum())
        size += float(wanted.double().square().sum())
    error = difference / max(size, 1e-30)
    rounds_inputs = bool(activation_formats(job.plan, job.source.layers))
    limit = max(LARGEST_ERROR[job.dtype], LARGEST_ERROR_INPUTS if rounds_inputs else 0)
    if not error <= limit:
        raise CheckpointError(
            f"{folder}: what was written does not predict what was tuned: relative squared error {error:.3g} "
            f"(at most {limit}). Please report this; the unfinished folder is kept"
        )
    return {"rows": len(held.outputs), "error": error}


def _load(job: Job, kind: Any, folder: Path) -> Any:
    with failures(folder, library="diffusers"), quiet_diffusers():
        return kind.from_pretrained(folder, dtype=job.dtype, local_files_only=True).to(job.device).eval()
