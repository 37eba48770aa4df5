"""How fast is plain rounding, beside copying the same files? What do several processes cost more than one?

    python benchmarks/plain_rounding.py [--billions 2] [--folder /where/there/is/room] [--runs 3] [--ranks 2]

Makes a random Llama-shaped model on disk, then in turn copies it (`cp -r`) and rounds it to W4A16 with
the command line, each run in a process of its own. Prints JSON lines: GB of source a second for both, their
ratio, peak resident memory (MiB).

`cp` ends when the bytes are in memory, our command when they are on the disk and were read back. So a copy is
timed both ways: until `cp` ends, and until `sync` of that file system ends too (`durable`).

With `--ranks` one process and so many take turns instead, of one thread each, started as Slurm does it.
Prints seconds of user and system time of all of them, imports included, and the ratio of user time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from process_cost import cost_of

from auto_round.checkpoint.disk import atomic_write_json
from auto_round.checkpoint.writer import ShardWriter

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 2560, 6912, 20, 32000


def make_model(folder: Path, billions: float) -> int:
    """Write a random model of about this size; returns the bytes of its weights."""
    block = {f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
    block |= {f"mlp.{n}_proj": (INTERMEDIATE, HIDDEN) for n in ("gate", "up")} | {
        "mlp.down_proj": (HIDDEN, INTERMEDIATE)
    }
    per_block = sum(a * b for a, b in block.values())
    layers = max(1, round((billions * 1e9 - 2 * VOCABULARY * HIDDEN) / per_block))
    specs = {"model.embed_tokens.weight": (torch.bfloat16, (VOCABULARY, HIDDEN))}
    for i in range(layers):
        specs |= {f"model.layers.{i}.{n}.weight": (torch.bfloat16, shape) for n, shape in block.items()}
        specs |= {
            f"model.layers.{i}.{n}.weight": (torch.bfloat16, (HIDDEN,))
            for n in ("input_layernorm", "post_attention_layernorm")
        }
    specs |= {
        "model.norm.weight": (torch.bfloat16, (HIDDEN,)),
        "lm_head.weight": (torch.bfloat16, (VOCABULARY, HIDDEN)),
    }
    generator = torch.Generator().manual_seed(0)
    with ShardWriter.create(folder, specs, max_shard_bytes=2 * 10**9) as writer:
        for name, (dtype, shape) in specs.items():
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            writer.put(name, tensor.to(dtype))
        writer.seal()
        size = writer.nbytes
    atomic_write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        },
    )
    return size


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident MiB of a command."""
    cost = cost_of(command, output=subprocess.DEVNULL)
    if cost.status:
        sys.exit(f"{command} failed")
    return cost.wall_s, cost.peak_mib


def rounded(source: Path, target: Path) -> list[str]:
    """The command that rounds a model."""
    options = ("--scheme", "W4A16", "--iters", "0", "--disable_opt_rtn", "--output_dir", str(target))
    return [sys.executable, "-m", "auto_round", str(source), *options]


def processor_time(command: list[str], ranks: int) -> tuple[float, float]:
    """User and system seconds of so many processes that do one run."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    everywhere = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        everywhere |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            env=everywhere | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
        )
        for rank in range(ranks)
    ]
    user = system = 0.0
    for process in started:
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{command} failed")
        user, system = user + usage.ru_utime, system + usage.ru_stime
    return user, system


def compare_ranks(source: Path, target: Path, size: int, ranks: int, runs: int) -> None:
    """Print what one process and several take."""
    ratios = []
    for _ in range(runs):
        found = {}
        for count in (1, ranks):
            found[count] = processor_time(rounded(source, target), count)
            shutil.rmtree(target)
        ratios.append(found[ranks][0] / found[1][0])
        seconds = {f"user_system_{n}": [round(s, 1) for s in each] for n, each in found.items()}
        about = {"source_gb": round(size / 1e9, 2), **seconds, "user_ratio": round(ratios[-1], 3)}
        print(json.dumps(about), flush=True)
    print(json.dumps({"median_user_ratio": round(statistics.median(ratios), 3), "runs": runs}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--billions", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {"ratio": [], "durable_ratio": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        source.mkdir()
        size = make_model(source, args.billions)
        if args.ranks > 1:
            compare_ranks(source, target, size, args.ranks, args.runs)
            return
        for _ in range(args.runs):
            shutil.rmtree(target, ignore_errors=True)
            timed(["sync", "-f", str(source)])
            copying, _ = timed(["cp", "-r", str(source), str(target)])
            syncing, _ = timed(["sync", "-f", str(target)])
            shutil.rmtree(target)
            rounding, peak = timed(rounded(source, target))
            ratios["ratio"].append(copying / rounding)
            ratios["durable_ratio"].append((copying + syncing) / rounding)
            figures = {
                "source_gb": round(size / 1e9, 2),
                "copy_gb_s": round(size / 1e9 / copying, 3),
                "durable_copy_gb_s": round(size / 1e9 / (copying + syncing), 3),
                "round_gb_s": round(size / 1e9 / rounding, 3),
                **{name: round(found[-1], 3) for name, found in ratios.items()},
                "peak_mib": peak,
            }
            print(json.dumps(figures), flush=True)
    medians = {f"median_{name}": round(statistics.median(found), 3) for name, found in ratios.items()}
    print(json.dumps({**medians, "runs": args.runs}))


if __name__ == "__main__":
    main()
