"""How fast is optimized rounding to a GGUF file, beside llama.cpp's quantizer with the same importances?

    PEER_LLAMA_CPP=... python benchmarks/gguf_speed.py [--layers 8] [--type q4_k_m] [--pairs 3]

Makes a random Llama, a 16-bit GGUF file of it and random importances. Then, in turn and each in a process of
its own with the same threads, llama.cpp quantizes the file and our command line the model. PEER_LLAMA_CPP
names a Python with llama-cpp-python and gguf. Prints one JSON line a pair and one with the medians: wall
seconds, processor seconds and peak resident memory (MiB) of whole processes, and the ratios ours / llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from process_cost import cost_of

from auto_round.export.gguf.imatrix import Importances, write_imatrix
from auto_round.schemes.gguf_types import FILE_TYPES

QUANTIZER = Path(__file__).parents[1] / "tests" / "peer" / "drivers" / "quantize_with_llama_cpp.py"


MAKER = """
import sys
from pathlib import Path
from cpu_decode_peers import make_model
make_model(Path(sys.argv[1]), int(sys.argv[2]))
"""
DEMO = Path(__file__).parents[1] / "examples" / "demo-model"
"""Its tokenizer can be written as GGUF."""


def measured(command: list[str], threads: int, log: Path) -> dict[str, float]:
    """Cost of one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as file:
        cost = cost_of(command, output=file, environment=environment)
    if cost.status:
        sys.exit(f"{command[0]} failed:\n" + log.read_text()[-3000:])
    return {"wall": round(cost.wall_s, 2), "cpu": round(cost.cpu_s, 2), "mib": cost.peak_mib}


def ours(model: Path, file_type: str, out: Path, *options: str) -> list[str]:
    """Our command line."""
    command = [sys.executable, "-m", "auto_round", str(model), "--format", f"gguf:{file_type}"]
    return [*command, "--iters", "0", "--no-verify", "--device", "cpu", "--output_dir", str(out), *options]


def random_importances(source: Path, out: Path) -> None:
    """Importances of every matrix of a GGUF file."""
    import gguf

    generator = torch.Generator().manual_seed(0)
    rows = {
        t.name: torch.rand(1, int(t.shape[0]), generator=generator).square() + 0.01
        for t in gguf.GGUFReader(source).tensors
        if len(t.shape) > 1
    }
    write_imatrix(out, Importances(rows, {name: torch.tensor([1000.0]) for name in rows}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--type", choices=sorted(FILE_TYPES), default="q4_k_m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    peer = os.environ.get("PEER_LLAMA_CPP")
    if not peer:
        sys.exit("PEER_LLAMA_CPP must name a Python with llama-cpp-python and gguf")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        # In a process of its own: a child's peak memory begins with what its parent holds.
        subprocess.run(
            [sys.executable, "-c", MAKER, str(scratch / "model"), str(args.layers)],
            check=True,
            cwd=Path(__file__).parent,
        )
        for file in DEMO.glob("tokenizer*"):
            shutil.copy(file, scratch / "model" / file.name)
        measured(ours(scratch / "model", "f16", scratch / "f16"), args.threads, scratch / "log")
        source = next((scratch / "f16").rglob("*.gguf"))
        random_importances(source, scratch / "imatrix.gguf")
        job = {
            "source": str(source),
            "target": str(scratch / "theirs.gguf"),
            "type": FILE_TYPES[args.type].number,
            "imatrix": str(scratch / "imatrix.gguf"),
            "threads": args.threads,
        }
        request = scratch / "request.json"
        request.write_text(json.dumps({"jobs": [job], "out": str(scratch / "answer.json")}))
        pairs = []
        for i in range(args.pairs):
            theirs = measured([peer, str(QUANTIZER), str(request)], args.threads, scratch / "log")
            command = ours(
                scratch / "model", args.type, scratch / f"out{i}", "--imatrix", str(scratch / "imatrix.gguf")
            )
            own = measured(command, args.threads, scratch / "log")
            pairs.append({f"{key}_ratio": round(own[key] / theirs[key], 3) for key in own})
            print(json.dumps({"ours": own, "llama.cpp": theirs, **pairs[-1]}), flush=True)
        medians = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
        print(json.dumps({"type": args.type, "layers": args.layers, **medians}))


if __name__ == "__main__":
    main()
