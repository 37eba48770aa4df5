"""Let llama.cpp quantize GGUF files, steered by an importance matrix or not.

The matrix is read with the `gguf` package, as `load_imatrix` of llama.cpp's tools/quantize reads it: sums of
squares divided by the tokens behind them.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np


def importances(path: str) -> dict[str, Any]:
    """Tensor name -> its importances, experts one after the other."""
    tensors = {t.name: np.array(t.data, dtype=np.float32) for t in gguf.GGUFReader(path).tensors}
    found = {}
    for name in (n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2")):
        counts = tensors[name + ".counts"].reshape(-1, 1)
        sums = tensors[name + ".in_sum2"].reshape(len(counts), -1)
        found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32).ravel()
    return found


def quantize(job: dict[str, Any]) -> int:
    """Code that llama.cpp returned, 0 for success.

    Args:
        job: `source`, `target`, number of the file type as `type`, `imatrix`, a path or null, and `threads`.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = job["type"], job.get("threads", 1)
    keep: list[Any] = []
    if job["imatrix"] is not None:
        known = importances(job["imatrix"])
        entries = (llama_cpp.llama_model_imatrix_data * (len(known) + 1))()
        for entry, (name, values) in zip(entries, known.items(), strict=False):
            numbers = (ctypes.c_float * values.size).from_buffer(values)
            keep += [numbers, values]
            entry.name, entry.data, entry.size = name.encode(), numbers, values.size
        params.imatrix = entries
        keep.append(entries)
    source, target = (str(job[key]).encode() for key in ("source", "target"))
    return int(llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)))


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(request["out"]).write_text(json.dumps([quantize(job) for job in request["jobs"]]))
