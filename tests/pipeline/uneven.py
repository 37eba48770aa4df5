"""A tiny model whose inputs have large channels, as real models have."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from auto_round.testing.tiny_models import save_tiny_model
from pipeline.runs import SIZES

OUTLIERS = 30.0


def save_uneven_model(folder: Path) -> Path:
    """A Llama some channels of whose norms are much larger than the others."""
    save_tiny_model("llama", folder, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[3::16] *= OUTLIERS
            if re.search("[qkv]_proj|gate_proj|up_proj", name):
                parameter[:, 3::16] /= OUTLIERS
    model.save_pretrained(folder)
    return folder
