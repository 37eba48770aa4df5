"""A Transformers model with the weights that are in a GGUF file, dequantized by the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from auto_round.evaluate.gguf_weights import gguf_weights


def reread(model: Path, file: Path) -> Any:
    """The model of a folder in float32, evaluation mode, every weight replaced by the file's.

    Args:
        model: the folder that the file was made from.
        file: GGUF file of a family in the table.
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    found = dict(gguf_weights(model, file))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.save_pretrained(file.parent.parent / "reread")
    path = file.parent.parent / "reread" / "model.safetensors"
    state = load_file(path)
    assert found.keys() == state.keys()
    save_file({n: found[n].contiguous() for n in state}, path, {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32).eval()
