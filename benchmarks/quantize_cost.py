"""What does a whole quantization run cost, beside another package's run of the same job?

    python benchmarks/quantize_cost.py MODEL --peer-python OTHER/bin/python --dataset text.jsonl --bits 4

Both Pythons run the same few lines against their own `auto_round` package, in turn (ours, theirs, ours, ...),
each in a process of its own. Prints one JSON line a pair, and one with the medians: wall seconds, processor
seconds, peak resident memory (MiB), and the ratios ours / theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = """
import json, sys
from auto_round import AutoRound
model, out, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
AutoRound(model, device_map="cpu", **arguments).quantize_and_save(out, format="auto_round")
"""


def run(python: str, model: str, arguments: dict) -> dict:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [python, "-c", SCRIPT, model, f"{folder}/out", json.dumps(arguments)], stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            sys.exit(f"{python} failed:\n" + (Path(folder) / "log").read_text()[-3000:])
    return {
        "wall_s": round(seconds, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": usage.ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--peer-python", required=True, help="Python with the other package")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=1)
    args = parser.parse_args()
    arguments = {
        "dataset": args.dataset,
        "bits": args.bits,
        "group_size": args.group_size,
        "sym": not args.asym,
        "iters": args.iters,
        "nsamples": args.nsamples,
        "seqlen": args.seqlen,
    }
    pairs = []
    for _ in range(args.pairs):
        ours = run(sys.executable, args.model, arguments)
        theirs = run(args.peer_python, args.model, arguments)
        pairs.append({f"{key}_ratio": round(ours[key] / theirs[key], 3) for key in ours})
        print(json.dumps({**arguments, "ours": ours, "theirs": theirs, **pairs[-1]}), flush=True)
    medians = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
    print(json.dumps({"model": Path(args.model).name, "pairs": len(pairs), **medians}))


if __name__ == "__main__":
    main()
