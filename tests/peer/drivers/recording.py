"""What every driver does with a model that its package has loaded: numbers into a file, failures into words.

Drivers run in another package's Python and know nothing of the package under test.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def main(load: Callable[[dict[str, Any]], Any]) -> None:
    """Serve the request named on the command line: `{"ids", "new_tokens", "jobs": [...]}`.

    Args:
        load: job -> model in evaluation mode, on a CPU.

    Writes for each job a safetensors file `out` (`logits` [1, tokens, vocabulary], `generated` [tokens],
    `weight.<layer>` [out, in], `bias.<layer>` [out]) and `<out>.json`: `{"dtype", "modules"}` or `{"error"}`.
    """
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    for job in request["jobs"]:
        out = Path(job["out"])
        try:
            tensors, facts = record(load(job), job["layers"], request)
            save_file(tensors, out)
        except Exception:  # noqa: BLE001  the test that asked for this job fails with it, the others go on
            facts = {"error": traceback.format_exc()}
        out.with_suffix(".json").write_text(json.dumps(facts))


@torch.inference_mode()
def record(
    model: Any, layers: dict[str, list[int]], request: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Logits, a greedy continuation, and the weight of every layer asked for."""
    ids = torch.tensor([request["ids"]])
    tensors = {"logits": model(input_ids=ids, use_cache=False).logits.float().contiguous()}
    tensors["generated"] = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request["new_tokens"],
        min_new_tokens=request["new_tokens"],
        do_sample=False,
    )[0, ids.shape[1] :].contiguous()
    dtype = next(p.dtype for p in model.parameters())
    modules = dict(model.named_modules())
    kinds = {}
    for name, shape in layers.items():
        tensors[f"weight.{name}"], bias = weight_of(modules[name], shape, dtype)
        if bias.count_nonzero():
            tensors[f"bias.{name}"] = bias
        kinds[name] = type(modules[name]).__name__
    return tensors, {"dtype": str(dtype).removeprefix("torch."), "modules": kinds}


def weight_of(module: Any, shape: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `[out, in]` and bias `[out]` of a layer, whatever it keeps: its answers to unit vectors, to 0.

    All products but one are with zero, so each answer is one dequantized weight plus the bias, in the dtype
    of the layer.
    """
    bias = module(torch.zeros(1, shape[1], dtype=dtype))[0].float().contiguous()
    w = (module(torch.eye(shape[1], dtype=dtype)).float() - bias).t().contiguous()
    if list(w.shape) != shape:
        raise ValueError(f"weight of shape {list(w.shape)}, expected {shape}")
    return w, bias
