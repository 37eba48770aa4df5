"""What identifies a run, so that an interrupted one is continued only by the same command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_round.calibration.row import fingerprint
from auto_round.config.groups import CalibrationOptions
from auto_round.config.tuning import TuneOptions
from auto_round.models.fingerprint import model_fingerprint
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.machine.description import machine, versions
from auto_round.pipeline.running.streams import SAVED_AS
from auto_round.tuning.config import TuneConfig
from auto_round.version import __version__


def signature(job: Job) -> dict[str, Any]:
    """Settings, data, model and arithmetic of a run, as JSON values."""
    calibration, output = job.options.calibration, job.options.output
    own: dict[str, Any] = {
        **arithmetic(job.device),
        "placed": None if job.placement is None else job.placement.kinds,
        "model_dtype": str(job.source.dtype),
        "compute_dtype": str(job.dtype),
        "model": model_fingerprint(job.source),
        "plan": _plan(job),
        "formats": {name: _plain(exporter) for name, exporter in job.exporters.items()},
        "calibration": None
        if job.rows is None
        else {"rows": job.rows.fingerprint, "tuned": job.tuned, "seed": calibration.seed} | _fresh(job),
        "imatrix": _digest(job.importance) if job.importance else None,
        "save_imatrix": job.saves_imatrix,
        "tune": _tune(job.tune),
        "max_shard_size": output.max_shard_size,
        "keep_streams": output.resume,
        "saved_streams": SAVED_AS,
    }
    others = _others(job.options.tune, calibration)
    return own | {name: value for name, value in others.items() if name not in own["tune"]}


def arithmetic(device: torch.device) -> dict[str, Any]:
    """What this process computes with, as JSON values: the part that a machine has in a signature."""
    return {
        "auto_round": __version__,
        "torch": torch.__version__,
        **versions(),
        "machine": machine(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "device": device.type,
    }


def _fresh(job: Job) -> dict[str, Any]:
    return {"fresh": fingerprint(job.fresh)} if job.fresh else {}


def _tune(tune: TuneConfig) -> dict[str, Any]:
    """Settings of the loop; of a schedule its values, since two functions may share a name."""
    found = {f.name: getattr(tune, f.name) for f in dataclasses.fields(tune)}
    if tune.schedule is not None:
        found["schedule"] = [float(tune.schedule(step, tune.iters)) for step in range(tune.iters)]
    return {name: _plain(value) for name, value in found.items()}


def _others(tune: TuneOptions, calibration: CalibrationOptions) -> dict[str, Any]:
    """Every option of tuning and of its data by its own name: some are recorded in the output as given.

    Where data comes from is left out: the rows themselves are compared.
    """
    found = {f.name: getattr(tune, f.name) for f in dataclasses.fields(tune)}
    of_data = ("nsamples", "seqlen", "seed", "act_percentile", "expert_rows")
    found |= {name: getattr(calibration, name) for name in of_data}
    del found["lr_scheduler"]
    return {name: _plain(value) for name, value in found.items()}


HOW = frozenset(
    {"torch", "machine", "threads", "device", "placed", "compute_dtype", "keep_streams", "saved_streams"}
    | {"enable_torch_compile"}
)
"""Parts of the signature that change how a result is reached, not what was asked for: a finished output with
others of these is still what was asked for."""


def request_digest(signature: Mapping[str, Any]) -> str:
    """SHA-256 of what was asked for, short: equal for two runs that should give the same output."""
    how = HOW | versions().keys()
    asked = {key: value for key, value in signature.items() if key not in how}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def _digest(importance: Mapping[str, Tensor]) -> str:
    """SHA-256 of importances, short."""
    digest = hashlib.sha256()
    for name in sorted(importance):
        digest.update(name.encode())
        digest.update(importance[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plan(job: Job) -> dict[str, Any]:
    """The plan in short, and a digest of all of it."""
    plan = job.plan
    return {
        "scheme": plan.scheme.label,
        "layers quantized": len(plan.quantized),
        "layers kept": len(plan.kept),
        "rules": {rule.key: None if rule.scheme is None else rule.scheme.label for rule in plan.rules},
        "digest": hashlib.sha256(plan.to_json().encode()).hexdigest()[:16],
    }


def _plain(value: Any) -> Any:
    """JSON value of a setting."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return list(value) if isinstance(value, list) else repr(value)
