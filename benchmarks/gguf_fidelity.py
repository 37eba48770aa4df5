"""How far are GGUF files from the model that they were made of: llama.cpp's, and ours of the same type?

    PEER_LLAMA_CPP=... python benchmarks/gguf_fidelity.py MODEL --text eval.txt --dataset calibration.jsonl \
        --types q2_k,q3_k_m,q4_k_m --tuned q3_k_m

Makes one importance matrix of the calibration data (`--save_imatrix`) and files of each type: by llama.cpp's
quantizer with that matrix, by us without tuning from the same matrix, by us without tuning from the data
itself, tuned, and tuned with the last block judged by predictions. Their tensors, dequantized by the `gguf`
package, are put into the Transformers model, so that only the weights differ. Files that are there already
are measured with `--files`. PEER_LLAMA_CPP names a Python with llama-cpp-python and gguf; without it,
llama.cpp is left out.

Prints one JSON line a file: size, perplexity, mean and 99th percentile of KL(original || file) in nats per
token, share of equal most likely tokens; with `--predict` also the perplexity that llama.cpp itself reaches
with the file, whose activations are rounded to 8 bits, and how many of 8 tokens it wrote.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.config import build_options
from auto_round.evaluate.gguf_weights import gguf_weights
from auto_round.pipeline.quantize import run
from auto_round.schemes.gguf_types import FILE_TYPES

QUANTIZER = Path(__file__).parents[1] / "tests" / "peer" / "drivers" / "quantize_with_llama_cpp.py"
PREDICT = """
import json, sys
import numpy as np
from llama_cpp import Llama
job = json.load(open(sys.argv[1]))
answers = []
for file in job["files"]:
    length = len(job["rows"][0])
    sizes = {"n_ctx": max(64, length), "n_batch": length, "n_threads": job["threads"]}
    model = Llama(file, logits_all=True, verbose=False, **sizes)
    nll = 0.0
    for row in job["rows"]:
        model.reset()
        model.eval(row)
        logits = np.array(model.scores[: length - 1], dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = logits[np.arange(length - 1), row[1:]]
        nll += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
    model.reset()
    written = []
    for token in model.generate(job["rows"][0][:16], temp=0.0):
        written.append(int(token))
        if len(written) == 8:
            break
    answers.append({"nll": nll / (length - 1) / len(job["rows"]), "generated": len(written)})
json.dump(answers, open(job["out"], "w"))
"""


def token_rows(model: Path, text: str, tokens: int, seqlen: int) -> Tensor:
    """Tokens of the text's beginning, `[rows, seqlen]`."""
    words = Path(text).read_text()[: tokens * 8]
    ids = AutoTokenizer.from_pretrained(model)(words, add_special_tokens=False)["input_ids"][:tokens]
    return torch.tensor(ids[: len(ids) // seqlen * seqlen]).view(-1, seqlen)


class Scale:
    """The original model and its predictions, against which files are weighed."""

    def __init__(self, model: Path, rows: Tensor) -> None:
        self.model, self.rows = model, rows
        self.loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.original = {n: p.clone() for n, p in self.loaded.state_dict().items()}
        self.reference = self.predictions()

    @torch.no_grad()
    def predictions(self) -> list[Tensor]:
        """Log-probabilities of the loaded weights, 8 rows at a time."""
        return [self.loaded(b, use_cache=False).logits[:, :-1].log_softmax(-1) for b in self.rows.split(8)]

    def nll(self, predicted: list[Tensor]) -> float:
        """Negative log-likelihood of the text, nats per token."""
        targets = self.rows[:, 1:, None].split(8)
        total = sum(-p.gather(-1, t).double().sum().item() for p, t in zip(predicted, targets, strict=True))
        return total / self.rows[:, 1:].numel()

    @torch.no_grad()
    def weigh(self, file: Path) -> dict[str, float]:
        """Figures of one file."""
        state = self.original | dict(gguf_weights(self.model, file))
        if self.loaded.get_output_embeddings().weight is self.loaded.get_input_embeddings().weight:
            state.pop("lm_head.weight", None)
        _, unexpected = self.loaded.load_state_dict(state, strict=False)
        if unexpected:
            raise SystemExit(f"{file}: {unexpected[:3]} belong to another model")
        found = self.predictions()
        pairs = list(zip(self.reference, found, strict=True))
        kl = torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in pairs])
        same = torch.cat([(p.argmax(-1) == q.argmax(-1)).flatten() for p, q in pairs])
        return {
            "perplexity_original": round(math.exp(self.nll(self.reference)), 4),
            "perplexity": round(math.exp(self.nll(found)), 4),
            "kl": round(kl.mean().item(), 6),
            "kl_p99": round(kl.quantile(0.99).item(), 5),
            "same_top": round(same.float().mean().item(), 5),
        }


def ours(args: argparse.Namespace, out: Path, kind: str, **given: object) -> Path:
    """A file of ours."""
    options = {
        "model": str(args.model),
        "output_dir": str(out),
        "format": f"gguf:{kind}",
        "iters": 0,
        "dataset": args.dataset,
        "nsamples": args.nsamples,
        "seqlen": args.seqlen,
        "device_map": "cpu",
        "verify": False,
    }
    if not any(out.glob("*.gguf")):
        run(build_options({**options, **given}))
    return next(path for path in out.glob("*.gguf") if "imatrix" not in path.name)


def theirs(python: str, source: Path, target: Path, kind: str, imatrix: Path) -> Path:
    """A file of llama.cpp's quantizer."""
    job = {"source": str(source), "target": str(target), "type": FILE_TYPES[kind].number}
    request = {"jobs": [job | {"imatrix": str(imatrix)}], "out": str(target) + ".json"}
    peer(python, [str(QUANTIZER)], request, target)
    if json.loads(Path(request["out"]).read_text()) != [0]:
        raise SystemExit(f"llama.cpp's quantizer failed for {kind}")
    return target


def peer(python: str, script: list[str], request: dict[str, object], beside: Path) -> None:
    path = Path(f"{beside}.request.json")
    path.write_text(json.dumps(request))
    done = subprocess.run([python, *script, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def predicted(python: str, file: Path, rows: Tensor, scratch: Path) -> dict[str, float]:
    """Perplexity by llama.cpp's own arithmetic, and how many tokens it wrote of the 8 wanted."""
    answer = scratch / "predicted.json"
    request = {"files": [str(file)], "rows": rows.tolist(), "threads": torch.get_num_threads()}
    peer(python, ["-c", PREDICT], request | {"out": str(answer)}, answer)
    (found,) = json.loads(answer.read_text())
    return {"perplexity_llama_cpp": round(math.exp(found["nll"]), 4), "generated": found["generated"]}


def files(args: argparse.Namespace, python: str | None, work: Path) -> dict[str, Path]:
    """All files to measure, by what made them."""
    found = {path: Path(path) for path in args.files}
    imatrix, source = work / "imatrix.gguf", None
    calibrated = {
        kind: ours(args, work / f"data-{kind}", kind, save_imatrix=str(imatrix)) for kind in args.types
    }
    if python is not None and args.types:
        source = ours(args, work / "f16", "f16")
    for kind in args.types:
        if source is not None and python is not None:
            target = work / f"theirs-{kind}.gguf"
            found[f"llama.cpp {kind}, imatrix"] = theirs(python, source, target, kind, imatrix)
        given = {"imatrix": str(imatrix)}
        found[f"ours {kind}, same imatrix"] = ours(args, work / f"imatrix-{kind}", kind, **given)
        found[f"ours {kind}, data"] = calibrated[kind]
    for kind in args.tuned:
        given = {"iters": args.iters, "distill_steps": args.distill_steps}
        together = f", {args.distill_steps} of all blocks" if args.distill_steps else ""
        found[f"ours {kind}, {args.iters} steps{together}"] = ours(
            args, work / f"tuned-{kind}", kind, **given
        )
    for kind in args.extended:
        given = {"iters": args.iters, "enable_alg_ext": True}
        found[f"ours {kind}, {args.iters} steps, extended"] = ours(
            args, work / f"extended-{kind}", kind, **given
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, help=".txt to measure on")
    parser.add_argument("--files", nargs="*", default=[], help="GGUF files to measure as they are")
    parser.add_argument("--dataset", help="calibration data for --types and --tuned")
    parser.add_argument("--types", type=lambda s: s.split(","), default=[], help="types to make, by commas")
    parser.add_argument("--tuned", type=lambda s: s.split(","), default=[], help="types to tune as well")
    parser.add_argument(
        "--extended",
        type=lambda s: s.split(","),
        default=[],
        help="types to tune with --enable_alg_ext",
    )
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--distill-steps", type=int, default=0, help="of all blocks together, behind --tuned")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--predict", action="store_true", help="ask llama.cpp for its perplexity too")
    parser.add_argument(
        "--work", type=Path, help="folder to keep the files in; those there are not made anew"
    )
    args = parser.parse_args()
    python = os.environ.get("PEER_LLAMA_CPP")
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        scale = Scale(args.model, token_rows(args.model, args.text, args.tokens, args.seqlen))
        for name, path in files(args, python, work).items():
            line = {"file": name, "mb": round(path.stat().st_size / 1e6, 3), **scale.weigh(path)}
            if args.predict and python is not None:
                line |= predicted(python, path, scale.rows, work)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
