"""Let llama.cpp's quantizer choose types for made-up models; answers to the file that the request names.

Every configuration names an architecture, sizes and tensors; a file of zeros with them is written and
quantized to every file type, and the types of its tensors are noted.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

KEPT = ("_norm.weight", "ffn_gate_inp.weight")


def write(path: Path, model: dict[str, Any]) -> None:
    """A file of 16-bit zeros (32-bit for what the converter keeps in 32 bits)."""
    writer = gguf.GGUFWriter(path, model["arch"])
    writer.add_block_count(model["n_layer"])
    writer.add_context_length(64)
    writer.add_embedding_length(model["n_embd"])
    writer.add_feed_forward_length(model["n_ff"])
    writer.add_head_count(model["n_head"])
    writer.add_head_count_kv(model["n_head_kv"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(model["n_vocab"])
    if model["n_expert"]:
        writer.add_expert_count(model["n_expert"])
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(model["n_ff"])
    writer.add_file_type(1)
    for name, shape in model["tensors"].items():
        plain = len(shape) == 1 or name.endswith(KEPT)
        data = np.zeros(shape, dtype=np.float32 if plain else np.float16)
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types_of(path: Path) -> dict[str, str]:
    """Tensor name -> type, in lower case."""
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}


def quantized(source: Path, target: Path, number: int, imatrix: dict[str, int] | None) -> dict[str, str]:
    """Types after quantizing to file type `number`; `imatrix`: tensor -> length of its (flat) importances."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = number
    params.nthread = 1
    keep: list[Any] = []
    if imatrix is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, size) in zip(entries, imatrix.items(), strict=False):
            values = (ctypes.c_float * size)(*([1.0] * size))
            keep.append(values)
            entry.name, entry.data, entry.size = name.encode(), values, size
        params.imatrix = entries
        keep.append(entries)
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code} for file type {number}")
    return types_of(target)


def main() -> None:
    """Write the tables."""
    job = json.loads(Path(sys.argv[1]).read_text())
    tables: dict[str, dict[str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "f16.gguf", Path(folder) / "out.gguf"
        for name, model in job["models"].items():
            write(source, model)
            imatrix = {
                n: shape[-1] * (shape[0] if len(shape) == 3 else 1)
                for n, shape in model["tensors"].items()
                if len(shape) > 1
            }
            tables[name] = {
                file: quantized(source, target, number, imatrix if model["imatrix"] else None)
                for file, number in job["files"].items()
                # llama.cpp wants importances for this one
                if model["imatrix"] or file != "q2_k_s"
            }
    Path(job["out"]).write_text(json.dumps(tables))


if __name__ == "__main__":
    main()
