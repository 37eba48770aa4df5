"""Load folders with Transformers and compressed-tensors."""

from __future__ import annotations

from typing import Any

import torch
from recording import main
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompressedTensorsConfig,
)


def load(job: dict[str, Any]) -> Any:
    """The model of one job; backend `dequantize` unpacks while reading, else layers do at first use."""
    options: dict[str, Any] = {"dtype": getattr(torch, job["dtype"])}
    if job["backend"] == "dequantize":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    sees = hasattr(AutoConfig.from_pretrained(job["folder"]), "vision_config")
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(job["folder"], **options).eval()


if __name__ == "__main__":
    main(load)
