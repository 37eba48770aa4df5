"""What does a block of many experts cost, beside another package?

    python benchmarks/experts_block.py TEXT --experts 128 --kinds rtn tune --peer-python OTHER/bin/python
    python benchmarks/experts_block.py TEXT --experts 128 --kinds decode

Writes a random Qwen3-MoE of one block with experts of 2048 x 768, reading nothing but TEXT (a file, or JSON
lines with a field `text`), from which its tokenizer is learned and which calibrates. Then each package
rounds it plainly (`rtn`), with a search (`search`) or tunes it (`tune`), W4G128, each run in a process of its
own. Prints one JSON line a run (wall and processor seconds, peak resident MiB), and the ratios at the end.
`decode` loads what this package rounded, and the model itself in bfloat16, and lets both generate in turns in
one process: processor seconds of loading, and milliseconds a token.

auto-round 0.16.1 reads no plain text files, so TEXT has to be JSON lines where it calibrates; tuning 128
experts takes it about 16 GB, 64 experts half of that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import Run
from cpu_decode import Decoder
from small_moe import make_tokenizer, texts_of
from transformers import AutoModelForCausalLM

from auto_round.checkpoint.disk import atomic_write_json
from auto_round.checkpoint.writer import ShardWriter

WIDTH, INNER, CHOSEN, HEADS, HEAD_WIDTH, VOCABULARY = 2048, 768, 8, 16, 128, 2048
FIGURES = ("wall_s", "cpu_s", "peak_mib")
DECODE = "decode"
KINDS: dict[str, dict[str, Any]] = {
    "rtn": {"iters": 0, "disable_opt_rtn": True},
    "search": {"iters": 0, "disable_opt_rtn": False},
    "tune": {},
}


def make_model(folder: Path, experts: int, text: Path) -> None:
    """Write a random model, one tensor at a time, and a tokenizer learned from a text."""
    layer, narrow = "model.layers.0.", HEADS // 4 * HEAD_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        **{f"{layer}{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")},
        **{f"{layer}self_attn.{n}_norm.weight": (HEAD_WIDTH,) for n in "qk"},
        f"{layer}self_attn.q_proj.weight": (HEADS * HEAD_WIDTH, WIDTH),
        **{f"{layer}self_attn.{n}_proj.weight": (narrow, WIDTH) for n in "kv"},
        f"{layer}self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_WIDTH),
        f"{layer}mlp.gate.weight": (experts, WIDTH),
    }
    for i in range(experts):
        shapes |= {f"{layer}mlp.experts.{i}.{n}_proj.weight": (INNER, WIDTH) for n in ("gate", "up")}
        shapes[f"{layer}mlp.experts.{i}.down_proj.weight"] = (WIDTH, INNER)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with ShardWriter.create(folder, specs, max_shard_bytes=1 << 30) as writer:
        for name, shape in shapes.items():
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            writer.put(name, tensor.bfloat16())
        writer.seal()
    make_tokenizer(texts_of(text), VOCABULARY).save_pretrained(folder)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 4,
        "head_dim": HEAD_WIDTH,
        "num_experts": experts,
        "num_experts_per_tok": CHOSEN,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    atomic_write_json(folder / "config.json", config)


def decode(folders: dict[str, Path], rounds: int = 5, count: int = 8) -> dict[str, Any]:
    """Processor time of loading models, and of generating with them in turns."""
    decoders, loading = {}, {}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, VOCABULARY, (1, 16), generator=generator)
    for name, folder in folders.items():
        begin = time.process_time()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        loading[name] = time.process_time() - begin
        decoders[name] = Decoder(model.eval(), prompt)
    costs: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        tokens = torch.randint(0, VOCABULARY, (count,), generator=generator)
        for name, decoder in decoders.items():
            begin = time.process_time()
            decoder.decode(tokens)
            costs[name].append((time.process_time() - begin) / count)
    return {
        "load_cpu_s": {name: round(seconds, 2) for name, seconds in loading.items()},
        "token_cpu_ms": {name: round(1e3 * statistics.median(each), 2) for name, each in costs.items()},
    }


def main() -> None:
    """Make the model, run both packages in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, DECODE], default=["rtn", "tune"])
    parser.add_argument("--peer-python", default="", help="its package runs too")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where there is room, and where the model is kept"
    )
    parser.add_argument("--iters", type=int, default=8)
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=64)
    given = parser.parse_args()
    texts = {"dataset": str(given.text), "nsamples": given.nsamples, "seqlen": given.seqlen}
    packages = {"ours": sys.executable} | ({"peer": given.peer_python} if given.peer_python else {})
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        model = (given.folder or Path(scratch)) / f"experts{given.experts}"
        if not model.exists():
            make_model(model, given.experts, given.text)
        for kind in given.kinds:
            if kind == DECODE:
                out = Path(scratch) / "packed"
                Run("ours", sys.executable, "", model, "W4G128", 42, tuple(KINDS["rtn"].items())).quantize(
                    out
                )
                print(
                    json.dumps(
                        {"kind": kind, "experts": given.experts} | decode({"bf16": model, "packed": out})
                    )
                )
                continue
            settings = {"iters": given.iters} | KINDS[kind] | ({} if kind == "rtn" else texts)
            costs = {}
            for name, python in packages.items():
                run = Run(name, python, "", model, "W4G128", 42, tuple(settings.items()))
                with tempfile.TemporaryDirectory(dir=scratch) as out:
                    costs[name] = run.quantize(Path(out) / "out")
                print(
                    json.dumps({"kind": kind, "package": name, "experts": given.experts, **costs[name]}),
                    flush=True,
                )
            if len(costs) > 1:
                ratios = {f: round(costs["ours"][f] / costs["peer"][f], 3) for f in FIGURES}
                print(json.dumps({"kind": kind, "ours / peer": ratios}), flush=True)


if __name__ == "__main__":
    main()
