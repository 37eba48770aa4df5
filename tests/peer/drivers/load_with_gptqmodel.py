"""Load GPTQ and AWQ folders with GPTQModel on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from recording import main


def load(job: dict[str, Any]) -> Any:
    """The model of one job; `backend` names one of GPTQModel's kernels."""
    backend = BACKEND(job["backend"]) if job.get("backend") else BACKEND.AUTO
    wrapped = GPTQModel.load(job["folder"], device="cpu", backend=backend, dtype=getattr(torch, job["dtype"]))
    return wrapped.model.eval()


if __name__ == "__main__":
    main(load)
