"""Do models of many times the memory finish? Runs below a limit, on ever larger models.

    python benchmarks/memory_ladder.py FOLDER [--limit 2] [--times 0.5 1 2 4] [--how tuned|optimized|plain]

Writes to FOLDER a random Llama-shaped model with `times` the limit (GiB) of weights and quantizes it in a
process whose address space is limited (`ulimit -v`), one model after the other: each is removed when it is
done. Prints a JSON line for each: weights and limit (GB), blocks, seconds, planned and measured peak (GB),
what the closing check found, how it ended.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from auto_round.checkpoint.disk import atomic_write_json
from auto_round.checkpoint.writer import ShardWriter

WIDTH, INNER, HEADS, GROUPS, VOCABULARY = 1024, 4096, 8, 4, 8000
ROWS, LENGTH = 4, 16
HOW = {
    "tuned": {"iters": 2, "nsamples": ROWS, "seqlen": LENGTH, "batch_size": 4},
    "optimized": {"iters": 0, "nsamples": ROWS, "seqlen": LENGTH},
    "plain": {"iters": 0, "disable_opt_rtn": True},
}
"""Two steps are as good as two hundred: every step takes the same memory."""


def make_model(folder: Path, nbytes: float) -> int:
    """Write a random model of about so many bytes; returns its number of blocks."""
    narrow = WIDTH // HEADS * GROUPS
    block = {f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in "qo"}
    block |= {f"self_attn.{n}_proj": (narrow, WIDTH) for n in "kv"}
    block |= {f"mlp.{n}_proj": (INNER, WIDTH) for n in ("gate", "up")} | {"mlp.down_proj": (WIDTH, INNER)}
    block |= {f"{n}_layernorm": (WIDTH,) for n in ("input", "post_attention")}
    each = 2 * sum(torch.Size(shape).numel() for shape in block.values())
    blocks = max(1, round((nbytes - 4 * VOCABULARY * WIDTH) / each))
    shapes = {f"model.layers.{i}.{n}.weight": shape for i in range(blocks) for n, shape in block.items()}
    shapes |= {"model.norm.weight": (WIDTH,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, WIDTH))
    noise = torch.randn(VOCABULARY * WIDTH, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with ShardWriter.create(folder, specs, max_shard_bytes=10**9) as writer:
        for i, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            tensor = torch.ones(shape).bfloat16() if len(shape) == 1 else noise.roll(i)[:count].reshape(shape)
            writer.put(name, tensor)
        writer.seal()
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "vocab_size": VOCABULARY}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    atomic_write_json(folder / "config.json", {**kind, **sizes, **heads, "tie_word_embeddings": False})
    return blocks


def quantize(folder: Path, how: str) -> None:
    """Quantize the model; this process is the limited one."""
    from auto_round.config import build_options
    from auto_round.pipeline.machine.memory import peak_bytes
    from auto_round.pipeline.quantize import run
    from auto_round.report.record import RUN_RECORD

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (ROWS + 4, LENGTH), generator=generator).tolist()
    given = {"model": str(folder / "model"), "output_dir": str(folder / "out"), "device_map": "cpu"}
    result = run(build_options({**given, **HOW[how]}), dataset=None if how == "plain" else rows)
    planned = json.loads((folder / "out" / RUN_RECORD).read_bytes())["memory"]["host_bytes"]
    check = result.report.get("verified")
    print(json.dumps({"planned_gb": planned / 1e9, "peak_gb": peak_bytes() / 1e9, "check": check}))


def limited(folder: Path, how: str, limit: int) -> dict[str, object]:
    """How a run below the limit ended."""
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, __file__, str(folder), "--how", how, "--here"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    seconds = round(time.perf_counter() - began, 1)
    if ended.returncode:
        return {"seconds": seconds, "ended": ended.stderr[-400:]}
    return {"seconds": seconds, "ended": "finished", **json.loads(ended.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of address space")
    parser.add_argument("--times", type=float, nargs="+", default=[0.5, 1, 2, 4])
    parser.add_argument("--how", choices=HOW, default="tuned")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        quantize(given.folder, given.how)
        return
    limit = int(given.limit * 2**30)
    for times in given.times:
        (given.folder / "model").mkdir(parents=True)
        try:
            blocks = make_model(given.folder / "model", times * limit)
            weights = sum(f.stat().st_size for f in (given.folder / "model").iterdir())
            about = {"times": times, "limit_gb": limit / 1e9, "weights_gb": weights / 1e9, "blocks": blocks}
            print(json.dumps({**about, **limited(given.folder, given.how, limit)}), flush=True)
        finally:
            for name in ("model", "out", "out.partial"):
                shutil.rmtree(given.folder / name, ignore_errors=True)


if __name__ == "__main__":
    main()
