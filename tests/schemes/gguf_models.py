"""Made-up models for the rules of GGUF mixtures: names and row lengths are real, heights are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from auto_round.schemes.gguf_mixture import BY_PLACE, MixtureFacts, Shape
from auto_round.schemes.gguf_types import FILE_TYPES

TABLES = Path(__file__).parent / "gguf_tables.json"
"""What llama.cpp's quantizer chose: model -> file type -> types of its tensors, run-length coded."""

_ROWS = 2


def _attention(i: int, *, fused: bool, row: int) -> dict[str, list[int]]:
    names = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
    return {f"blk.{i}.{name}.weight": [_ROWS, row] for name in (*names, "attn_output")}


def _feed_forward(i: int, experts: int, row: int) -> dict[str, list[int]]:
    if not experts:
        return {f"blk.{i}.{name}.weight": [_ROWS, row] for name in ("ffn_gate", "ffn_up", "ffn_down")}
    stacked = {
        f"blk.{i}.{name}_exps.weight": [experts, _ROWS, row] for name in ("ffn_gate", "ffn_up", "ffn_down")
    }
    return {f"blk.{i}.ffn_gate_inp.weight": [experts, row], **stacked}


def _model(
    arch: str,
    n_layer: int,
    heads: tuple[int, int],
    *,
    experts: int = 0,
    tied: bool = False,
    row: int = 256,
    down_row: int = 256,
    imatrix: bool = False,
) -> dict[str, Any]:
    tensors: dict[str, list[int]] = {"token_embd.weight": [_ROWS, row], "output_norm.weight": [row]}
    if not tied:
        tensors["output.weight"] = [_ROWS, row]
    for i in range(n_layer):
        tensors[f"blk.{i}.attn_norm.weight"] = [row]
        tensors |= _attention(i, fused=arch == "falcon", row=row)
        tensors |= _feed_forward(i, experts, row)
        if down_row != row:
            tensors[f"blk.{i}.ffn_down.weight"] = [_ROWS, down_row]
    return {
        "arch": arch,
        "n_layer": n_layer,
        "n_head": heads[0],
        "n_head_kv": heads[1],
        "n_expert": experts,
        "n_embd": 256,
        "n_ff": 256,
        "n_vocab": _ROWS,
        "tensors": tensors,
        "imatrix": imatrix,
    }


MODELS: dict[str, dict[str, Any]] = {
    "dense, 32 blocks": _model("llama", 32, (8, 8)),
    "dense, 32 blocks, importances": _model("llama", 32, (8, 8), imatrix=True),
    "grouped queries 8:1": _model("llama", 32, (8, 1), imatrix=True),
    "80 blocks, grouped queries": _model("llama", 80, (8, 1), imatrix=True),
    "80 blocks of qwen2": _model("qwen2", 80, (8, 8)),
    "8 experts": _model("llama", 32, (8, 2), experts=8, imatrix=True),
    "128 experts": _model("qwen3moe", 48, (8, 1), experts=128, imatrix=True),
    "60 experts": _model("qwen2moe", 24, (8, 8), experts=60),
    "tied head": _model("qwen3", 28, (8, 4), tied=True, imatrix=True),
    "odd rows": _model("qwen2", 24, (14, 2), tied=True, row=96, down_row=352, imatrix=True),
    "odd rows, own head": _model("qwen2", 24, (14, 2), row=96),
    "very odd rows": _model("llama", 18, (9, 3), row=72, imatrix=True),
    "falcon": _model("falcon", 32, (8, 1), imatrix=True),
    "falcon, few blocks": _model("falcon", 9, (8, 1)),
    "gemma2, odd number of blocks": _model("gemma2", 13, (8, 4), tied=True, imatrix=True),
}
"""Models by what is special about them, as the driver of llama.cpp's quantizer wants them."""

FILES = {name: kind.number for name, kind in FILE_TYPES.items() if name not in BY_PLACE}
"""File types by name."""


def facts(model: dict[str, Any]) -> MixtureFacts:
    """What the rules know of one of `MODELS`."""
    names = ("arch", "n_layer", "n_head", "n_head_kv", "n_expert", "imatrix")
    return MixtureFacts(**{name: model[name] for name in names})


def shapes(model: dict[str, Any]) -> list[Shape]:
    """Its tensors."""
    return [Shape(name, tuple(shape)) for name, shape in model["tensors"].items()]


def condensed(types: dict[str, str], names: list[str]) -> str:
    """Types in the order of `names`, as `q4_k*3 q6_k ...`."""
    runs: list[list[Any]] = []
    for name in names:
        if runs and runs[-1][0] == types[name]:
            runs[-1][1] += 1
        else:
            runs.append([types[name], 1])
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)


def stored_tables() -> dict[str, dict[str, str]]:
    """Model -> file type -> condensed types, from the file."""
    tables: dict[str, dict[str, str]] = json.loads(TABLES.read_text())
    return tables
