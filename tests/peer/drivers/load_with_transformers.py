"""Load folders with Transformers and the auto-round that is installed beside it."""

from __future__ import annotations

from typing import Any

import torch
from recording import main
from transformers import AutoModelForCausalLM, AutoRoundConfig


def load(job: dict[str, Any]) -> Any:
    """The model of one job; `backend` names a kernel of auto-round."""
    options: dict[str, Any] = {"dtype": getattr(torch, job["dtype"])}
    if job.get("backend"):
        options["quantization_config"] = AutoRoundConfig(backend=job["backend"])
    return AutoModelForCausalLM.from_pretrained(job["folder"], **options).eval()


if __name__ == "__main__":
    main(load)
