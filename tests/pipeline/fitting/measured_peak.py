"""One run in a process of its own: what it planned and what it took, beside what Python and imports hold.

`python measured_peak.py SHAPE FOLDER [float32]` prints a line of JSON; the model lies in `FOLDER/model`.
Blocks run in bfloat16 where the processor multiplies it, unless float32 is asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_ATTENTION = {"num_attention_heads": 8, "num_key_value_heads": 4}
_SHORT = {"iters": 5, "nsamples": 8, "seqlen": 128, "batch_size": 4}
"""The last of five steps takes a whole batch (`tuning.steps.GROWTH`); of three none does."""
_PLAIN = {"iters": 0, "disable_opt_rtn": True, "verify": False}
_DENSE = {"hidden_size": 768, "intermediate_size": 2048, **_ATTENTION}
_EXPERTS = {
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "head_dim": 64,
    **_ATTENTION,
}
_VOCABULARY = {"hidden_size": 512, "intermediate_size": 768, "vocab_size": 48000, **_ATTENTION}
_LARGE_EXPERTS = {
    "hidden_size": 1024,
    "moe_intermediate_size": 2048,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 128,
    **_ATTENTION,
}
SHAPES = {
    "dense": ("llama", _DENSE, _SHORT),
    "no gate": (
        "gpt_neox",
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 8},
        _SHORT,
    ),
    "experts": ("qwen3_moe", _EXPERTS, _SHORT),
    "experts of one parameter": (
        "gpt_oss",
        {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 8, "head_dim": 64, **_ATTENTION},
        _SHORT,
    ),
    "experts that all see all tokens": (
        "llama4_text",
        {
            "hidden_size": 512,
            "intermediate_size": 512,
            "intermediate_size_mlp": 512,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "head_dim": 64,
            "moe_layers": [0, 1],
            "attention_chunk_size": 32,
            **_ATTENTION,
        },
        _SHORT,
    ),
    "long rows": (
        "llama",
        {"hidden_size": 256, "intermediate_size": 512, **_ATTENTION},
        {**_SHORT, "seqlen": 2048},
    ),
    "vocabulary": ("llama", _VOCABULARY, _SHORT),
    "matrices of 16 MB": (
        "llama",
        {"hidden_size": 1024, "intermediate_size": 4096, **_ATTENTION},
        {**_SHORT, "seqlen": 16},
    ),
    "matrices of 50 MB": (
        "llama",
        {"hidden_size": 1024, "intermediate_size": 12288, "num_hidden_layers": 1, **_ATTENTION},
        {**_SHORT, "seqlen": 64},
    ),
    "large experts": ("qwen3_moe", _LARGE_EXPERTS, {**_SHORT, "seqlen": 32}),
    "large experts, many steps": ("qwen3_moe", _LARGE_EXPERTS, {**_SHORT, "seqlen": 32, "iters": 100}),
    "large matrices and long rows": (
        "qwen3",
        {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128, **_ATTENTION},
        {**_SHORT, "seqlen": 1024},
    ),
    "asymmetric": (
        "llama",
        {"hidden_size": 1024, "intermediate_size": 4096, **_ATTENTION},
        {**_SHORT, "seqlen": 16, "scheme": "W2A16", "sym": False},
    ),
    "floats": (
        "llama",
        {"hidden_size": 1024, "intermediate_size": 4096, **_ATTENTION},
        {**_SHORT, "seqlen": 16, "scheme": "MXFP4", "group_size": 32},
    ),
    "compiled": (
        "llama",
        {"hidden_size": 1024, "intermediate_size": 4096, **_ATTENTION},
        {**_SHORT, "seqlen": 16, "enable_torch_compile": True},
    ),
    "optimized rounding": (
        "llama",
        {"hidden_size": 1024, "intermediate_size": 4096, **_ATTENTION},
        {**_SHORT, "seqlen": 16, "iters": 0},
    ),
    "plain rounding": (
        "llama",
        {"hidden_size": 1024, "intermediate_size": 12288, **_ATTENTION},
        {**_SHORT, **_PLAIN},
    ),
    "plain rounding to floats": (
        "llama",
        {"hidden_size": 1024, "intermediate_size": 12288, **_ATTENTION},
        {**_SHORT, **_PLAIN, "scheme": "MXFP4", "group_size": 32},
    ),
    "compiled, long rows": (
        "llama",
        {"hidden_size": 256, "intermediate_size": 512, **_ATTENTION},
        {**_SHORT, "seqlen": 2048, "enable_torch_compile": True},
    ),
    "all blocks together": ("llama", _DENSE, {**_SHORT, "distill_steps": 3}),
    "all blocks together, experts": ("qwen3_moe", _EXPERTS, {**_SHORT, "distill_steps": 3}),
    "all blocks together, vocabulary": ("llama", _VOCABULARY, {**_SHORT, "distill_steps": 3}),
    "many rows": (
        "qwen3",
        {"hidden_size": 512, "intermediate_size": 768, "head_dim": 64, **_ATTENTION},
        {**_SHORT, "nsamples": 96, "seqlen": 512},
    ),
}
"""Family, sizes and settings. Each takes 100 to 500 MB beside what Python and imports hold.

Holes of the C library's heap can grow from step to step, as they did for experts: few steps do not show it.
"""
VOCABULARY = 2048


def make_model(shape: str, folder: Path) -> None:
    """Save a random model."""
    import torch
    from transformers import AutoModelForCausalLM

    from auto_round.testing.tiny_models import tiny_config

    family, sizes, _ = SHAPES[shape]
    torch.manual_seed(0)
    config = tiny_config(family, **{"vocab_size": VOCABULARY, "max_position_embeddings": 4096, **sizes})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measure(shape: str, folder: Path, *, amp: bool = True) -> dict[str, float]:
    """Quantize the model; bytes above what is held once everything is imported.

    Args:
        shape: one of `SHAPES`.
        folder: that holds the model.
        amp: the run's own choice of a dtype; False for float32.
    """
    import torch
    import transformers  # noqa: F401  held before the run, as the rest that is imported

    from auto_round.config import build_options
    from auto_round.pipeline.machine.memory import peak_bytes, resident_bytes
    from auto_round.pipeline.quantize import run
    from auto_round.report.record import RUN_RECORD
    from auto_round.tuning.distill import rows_of_step

    _, sizes, given = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    steps = given.get("distill_steps", 0) * rows_of_step(given["seqlen"])
    shape_of_rows = (given["nsamples"] * 9 // 8 + 4 + steps, given["seqlen"])
    rows = torch.randint(3, sizes.get("vocab_size", VOCABULARY), shape_of_rows, generator=generator).tolist()
    held = resident_bytes()
    out = folder / "out"
    named = {"model": str(folder / "model"), "output_dir": str(out), "device_map": "cpu", "amp": amp}
    run(build_options({**named, "group_size": 128, **given}), dataset=rows)
    planned = json.loads((out / RUN_RECORD).read_bytes())["memory"]
    return {
        "planned": planned["host_bytes"] - held,
        "measured": peak_bytes() - held,
        "stages": planned["stages"],
    }


if __name__ == "__main__":
    found = measure(sys.argv[1], Path(sys.argv[2]), amp="float32" not in sys.argv[3:])
    sys.stdout.write(json.dumps(found) + "\n")
