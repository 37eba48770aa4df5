"""How far are quantized models from their originals, and what did it cost, beside another package?

    python benchmarks/accuracy.py --models A B --schemes W2G64 W3G64A --texts wiki.txt books.jsonl \
        --dataset calibration.jsonl --peer-python OTHER/bin/python --seeds 42 1 --out results.jsonl

A scheme is `W<bits>G<group>`, with an `A` behind it for zero points; `:RTN` behind that rounds without
tuning. Each run is a process of its own and uses the package `auto_round` of its Python through the same
few lines. Its folder is then read by us: only the weights differ. Texts are for measuring only and take no
part in any choice.

Writes one JSON line a run: wall and processor seconds, peak memory (MiB), and for each text the mean
KL(original || quantized) in nats per token, both perplexities and the share of equal most likely tokens.
Then how the first tokens of rows fare, which attention uses as a sink in large models: `sink_energy`, their
mean square over the median token's after the block where that is largest; `sink_error` and `other_error`,
squared distance of their and of all other hidden states from the original's over their squares, mean over
blocks; `sink_attention`, mean share of attention that the first token gets, original's and quantized.

Runs whose line is in the file already are left out, so an interrupted table continues. Ends with the table
in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.evaluate.logits import Comparison

SCRIPT = """
import json, sys
from auto_round import AutoRound
model, out, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
AutoRound(model, device_map="cpu", **arguments).quantize_and_save(out, format="auto_round")
"""
SINK_ROWS = 4
"""Rows whose attention is looked at: it is held for all blocks and heads at once."""


@dataclass(frozen=True)
class Run:
    """One quantization: which package, model and settings."""

    package: str
    python: str
    model: Path
    scheme: str
    seed: int
    settings: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        """What tells it from others in the file of results."""
        named = {"package": self.package, "model": self.model.name, "scheme": self.scheme, "seed": self.seed}
        return json.dumps(named | dict(self.settings), sort_keys=True)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `AutoRound`."""
        found = re.fullmatch(r"W(\d)G(-?\d+)(A?)(:RTN)?", self.scheme)
        if not found:
            sys.exit(f"--schemes {self.scheme}: expected W2G64, W3G128A, W4G32:RTN, ...")
        wanted = dict(self.settings) | {
            "bits": int(found[1]),
            "group_size": int(found[2]),
            "sym": not found[3],
        }
        return wanted | {"seed": self.seed} | ({"iters": 0} if found[4] else {})

    def quantize(self, out: Path) -> dict[str, float]:
        """Run it in a process of its own; returns what it cost."""
        log = out.with_suffix(".log")
        with log.open("w") as stream:
            begin = time.perf_counter()
            command = [self.python, "-c", SCRIPT, str(self.model), str(out), json.dumps(self.arguments())]
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - begin
        if status:
            sys.exit(f"{self.key} failed:\n{log.read_text()[-3000:]}")
        return {
            "wall_s": round(seconds, 1),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_mib": usage.ru_maxrss // 1024,
        }


def words(path: Path) -> str:
    """Text of a .txt, or of the field `text` of a .jsonl."""
    if path.suffix != ".jsonl":
        return path.read_text()
    return "\n\n".join(json.loads(line)["text"][:3000] for line in path.open())


class Original:
    """The unquantized model and what it says of the texts."""

    def __init__(self, folder: Path, texts: list[Path], tokens: int, seqlen: int) -> None:
        self.model = loaded(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rows = {}
        for path in texts:
            ids = tokenizer(words(path)[: tokens * 8], add_special_tokens=False)["input_ids"][:tokens]
            self.rows[path.stem] = torch.tensor(ids[: len(ids) // seqlen * seqlen]).view(-1, seqlen)
        # float16 halves the memory; a KL is changed by about 1e-5.
        self.logits = {
            name: [self.model(row[None], use_cache=False).logits[0, :-1].half() for row in rows]
            for name, rows in self.rows.items()
        }
        first = next(iter(self.rows.values()))[:SINK_ROWS]
        self.states = inner(self.model, first)

    def compare(self, folder: Path) -> dict[str, Any]:
        """Figures of a quantized folder."""
        candidate = loaded(folder).dequantize()  # only the weights differ, not the kernels
        found: dict[str, Any] = {"kl": {}, "perplexity": {}, "perplexity_original": {}, "same_top": {}}
        for text, rows in self.rows.items():
            total = Comparison()
            for row, reference in zip(rows, self.logits[text], strict=True):
                total.add(reference, candidate(row[None], use_cache=False).logits[0, :-1], row[1:])
            found["kl"][text] = round(total.kl, 5)
            found["perplexity"][text] = round(total.perplexity, 3)
            found["perplexity_original"][text] = round(total.perplexity_reference, 3)
            found["same_top"][text] = round(total.agreement, 4)
        first = next(iter(self.rows.values()))[:SINK_ROWS]
        return found | sinks(self.states, inner(candidate, first))


def loaded(folder: Path) -> Any:
    """The model of a folder in float32, with attention that can be looked at."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@dataclass(frozen=True)
class Inner:
    """Hidden states after each block `[blocks, rows, tokens, width]`, and attention to the first token."""

    hidden: Tensor
    attention: float


def inner(model: nn.Module, rows: Tensor) -> Inner:
    """What happens inside of a model; attention is the mean over blocks, heads and later tokens."""
    out = model(rows, use_cache=False, output_hidden_states=True, output_attentions=True)
    attention = torch.stack([a[..., rows.shape[1] // 2 :, 0].mean() for a in out.attentions]).mean()
    return Inner(torch.stack(out.hidden_states[1:-1]), float(attention))


def sinks(before: Inner, after: Inner) -> dict[str, float]:
    """How the first tokens of rows fare beside the others."""
    energy = before.hidden.square().mean(-1)
    error = (after.hidden - before.hidden).square().mean(-1)
    largest = energy[:, :, 0].mean(1) / energy[:, :, 1:].flatten(1).median(dim=1).values
    return {
        "sink_energy": round(float(largest.max()), 1),
        "sink_error": round(float((error[:, :, 0] / energy[:, :, 0]).mean()), 5),
        "other_error": round(float((error[:, :, 1:] / energy[:, :, 1:]).mean()), 5),
        "sink_attention_original": round(before.attention, 4),
        "sink_attention": round(after.attention, 4),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The results in Markdown, one row a run."""
    texts = sorted({text for line in lines for text in line["kl"]})
    head = [
        "model",
        "scheme",
        "seed",
        "package",
        *(f"KL {t}" for t in texts),
        *(f"same top {t}" for t in texts),
    ]
    head += ["wall s", "peak MiB", "sink error", "other error", "attention to sink"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        run = json.loads(line["run"])
        rows.append(
            [
                *(str(run[name]) for name in ("model", "scheme", "seed", "package")),
                *(str(line[kind].get(text, "")) for kind in ("kl", "same_top") for text in texts),
                *(str(line[name]) for name in ("wall_s", "peak_mib", "sink_error", "other_error")),
                f"{line['sink_attention_original']} -> {line['sink_attention']}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--schemes", nargs="+", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--dataset", required=True, help="calibration data")
    parser.add_argument("--peer-python", help="Python with the other package; without it only ours runs")
    parser.add_argument("--skip-ours", action="store_true")
    parser.add_argument("--label", default="ours", help="name of our package in the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--extra", type=json.loads, default={}, help="JSON of further arguments of both")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of each text that are measured")
    parser.add_argument("--measure-seqlen", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True, help="file of results, one JSON line a run")
    args = parser.parse_args()
    settings = {
        "dataset": args.dataset,
        "iters": args.iters,
        "nsamples": args.nsamples,
        "seqlen": args.seqlen,
    }
    pairs = [] if args.skip_ours else [(args.label, sys.executable)]
    pairs += [("peer", args.peer_python)] if args.peer_python else []
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    with torch.no_grad():
        for model in args.models:
            original = None
            for scheme, seed, (package, python) in [
                (scheme, seed, pair) for scheme in args.schemes for seed in args.seeds for pair in pairs
            ]:
                run = Run(package, python, model, scheme, seed, tuple((settings | args.extra).items()))
                if any(line["run"] == run.key for line in known):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    cost = run.quantize(Path(folder) / "out")
                    made = next(path.parent for path in Path(folder).rglob("config.json"))
                    original = original or Original(model, args.texts, args.tokens, args.measure_seqlen)
                    known.append({"run": run.key, **cost, **original.compare(made)})
                with args.out.open("a") as file:
                    file.write(json.dumps(known[-1]) + "\n")
                print(json.dumps(known[-1]), flush=True)
    print(table(known))


if __name__ == "__main__":
    main()
