"""Quantize folders with the other auto-round: a job is a model, arguments, a format."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from auto_round import AutoRound


def quantize(job: dict[str, Any]) -> None:
    """Quantize one model; `<folder>.json` says `{"folder"}`, where the result lies, or `{"error"}`."""
    try:
        AutoRound(job["model"], device_map="cpu", **job["arguments"]).quantize_and_save(
            job["folder"], format=job["format"]
        )
        # Some of its formats are written to a sub-folder named after the model.
        facts = {"folder": str(next(Path(job["folder"]).rglob("config.json")).parent)}
    except Exception:  # noqa: BLE001  the test that asked for this job fails with it, the others go on
        facts = {"error": traceback.format_exc()}
    Path(job["folder"] + ".json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text())["jobs"]:
        quantize(job)
