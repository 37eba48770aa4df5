"""How far are quantized models from their originals, and what did it cost, beside another package?

    python benchmarks/accuracy.py --half dev --models A B --schemes W2G64 W3G64A --seeds 42 1 \
        --dataset calibration.jsonl --dev-texts books.jsonl --report-texts wiki.txt python-docs talk.jsonl \
        --ours default best 'halved={"iters": 20, "distill_steps": 20}' --peer-python OTHER/bin/python

A scheme is `W<bits>G<group>`, with an `A` behind it for zero points, or a name as `MXFP4`; `:RTN` behind that
rounds without tuning. Each run is a process of its own and uses the package `auto_round` of its Python
through the same few lines. Its folder is then read by us: only the weights differ, and in schemes with a name
the inputs of layers are rounded too.

**Two halves.** Choices are made by what `--half dev` shows. `--half report` measures texts that had no say,
and is looked at when all is chosen. A text is a file (`text` or `context` of JSON lines) or `python-docs`.
Calibration data belong to neither.

**Recipes.** `--ours` names recipes of ours, or makes some up: `NAME={arguments}`, which may name a `recipe`.
The other package runs `--peer` (its default, its `best` or `light`, or `NAME={arguments}`), with the same
rows.

Writes one JSON line a run: our commit or the other's version, wall and processor seconds, peak memory (MiB),
and for each text the mean KL(original || quantized) in nats per token, both perplexities and the share of
equal most likely tokens (`measured`: tokens of a text, tokens of a row). Then how the first tokens of rows
fare, which attention uses as a sink in large models: `sink_energy`, their mean square over the median
token's after the block where that is largest; `sink_error` and `other_error`, squared distance of their and
of all other hidden states from the original's over their squares, mean over blocks; `sink_attention`, mean
share of attention that the first token gets, original's and quantized.

What is in the file already is left out, so an interrupted table continues; with `--keep` folders stay, and
the second half needs no second run. Runs of the other package stay valid as long as its version does; those
of ours are found again by their commit, unless `--any-commit` is given. Ends with tables in Markdown: all
figures, and for each recipe the geometric mean over texts of its KL over the other package's, with the times;
`--draw FILE.svg` draws KL against processor time, one panel a number of bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_tables import DEFAULT, PEER, against_peer, draw, table
from other_python import environment_of
from process_cost import cost_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.calibration.python_docs import PythonDocs
from auto_round.evaluate.logits import Comparison

SCRIPT = """
import json, sys
from auto_round import AutoRound
model, out, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
AutoRound(model, device_map="cpu", **arguments).quantize_and_save(out, format="auto_round")
"""
SINK_ROWS = 4
"""Rows whose attention is looked at: it is held for all blocks and heads at once."""


PYTHON_DOCS = "python-docs"
PEER_RECIPES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "light": {"iters": 50, "lr": 5e-3},
    "best": {"iters": 1000, "nsamples": 512},
}
"""Of auto-round 0.16.1, by the arguments that they stand for."""


@dataclass(frozen=True)
class Run:
    """One quantization: which package, model and settings."""

    package: str
    python: str
    version: str
    model: Path
    scheme: str
    seed: int
    settings: tuple[tuple[str, Any], ...]

    @property
    def named(self) -> dict[str, Any]:
        """What it is, without paths."""
        named = {"package": self.package, "model": self.model.name, "scheme": self.scheme, "seed": self.seed}
        data = {
            name: ",".join(Path(part).name for part in value.split(","))
            for name, value in self.settings
            if name == "dataset"
        }
        return named | dict(self.settings) | data

    @property
    def key(self) -> str:
        """What tells it from others in the file of results."""
        return json.dumps(self.named, sort_keys=True)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `AutoRound`."""
        name, _, how = self.scheme.partition(":")
        if how not in ("", "RTN"):
            sys.exit(f"--schemes {self.scheme}: expected nothing or :RTN behind {name}")
        scheme: dict[str, Any] = {"scheme": name}
        if found := re.fullmatch(r"W(\d)G(-?\d+)(A?)", name):
            scheme = {"bits": int(found[1]), "group_size": int(found[2]), "sym": not found[3]}
        wanted = dict(self.settings) | scheme
        return wanted | {"seed": self.seed} | ({"iters": 0} if how else {})

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are rounded, too: then the folder is compared as it runs."""
        return not self.scheme.startswith("W")

    def quantize(self, out: Path) -> dict[str, Any]:
        """Run it in a process of its own; returns what it cost."""
        log = out.with_suffix(".log")
        command = [self.python, "-c", SCRIPT, str(self.model), str(out), json.dumps(self.arguments())]
        with log.open("w") as stream:
            cost = cost_of(command, output=stream, environment=environment_of(self.python))
        if cost.status:
            sys.exit(f"{self.key} failed:\n{log.read_text()[-3000:]}")
        return {
            "version": self.version,
            "threads": torch.get_num_threads(),
            "wall_s": round(cost.wall_s, 1),
            "cpu_s": round(cost.cpu_s, 1),
            "peak_mib": cost.peak_mib,
        }

    def folder(self, under: Path) -> tuple[Path, dict[str, Any]]:
        """The quantized folder and what it cost; made unless it is there."""
        digest = hashlib.sha256(f"{self.key} {self.version}".encode()).hexdigest()[:12]
        out = under / f"{self.model.name}-{self.scheme}-{digest}"
        told = out.with_suffix(".cost")
        under.mkdir(parents=True, exist_ok=True)
        if not told.exists():
            shutil.rmtree(out, ignore_errors=True)
            told.write_text(json.dumps(self.quantize(out)))
        return next(path.parent for path in out.rglob("config.json")), json.loads(told.read_text())


def commit() -> str:
    """Of this repository, with a `+` where files differ from it."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    head = subprocess.run(
        [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "../src"],
        capture_output=True,
        text=True,
        check=True,
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def version_of(python: str) -> str:
    """Version of the package of a Python."""
    code = "from importlib.metadata import version; print(version('auto-round'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return found.stdout.strip()


def recipe(given: str, known: Mapping[str, dict[str, Any]] | None = None) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a recipe: `NAME`, one of ours unless they are `known`, or `NAME={...}`."""
    name, _, arguments = given.partition("=")
    if arguments:
        return name, json.loads(arguments)
    return name, {"recipe": name} if known is None else known[name]


def words(text: str) -> str:
    """A text: a file, of JSON lines their `text` or `context`, or `python-docs`."""
    if text == PYTHON_DOCS:
        return "\n\n".join(document[:3000] for document in PythonDocs())
    path = Path(text)
    if path.suffix != ".jsonl":
        return path.read_text()
    lines = [json.loads(line) for line in path.open()]
    return "\n\n".join((line.get("text") or line["context"])[:3000] for line in lines)


class Original:
    """The unquantized model and what it says of the texts."""

    def __init__(self, folder: Path, texts: list[str], tokens: int, seqlen: int) -> None:
        self.model = loaded(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rows = {}
        for text in texts:
            ids = tokenizer(words(text)[: tokens * 8], add_special_tokens=False)["input_ids"][:tokens]
            self.rows[Path(text).stem] = torch.tensor(ids[: len(ids) // seqlen * seqlen]).view(-1, seqlen)
        # float16 halves the memory; a KL is changed by about 1e-5.
        self.logits = {
            name: [self.model(row[None], use_cache=False).logits[0, :-1].half() for row in rows]
            for name, rows in self.rows.items()
        }
        first = next(iter(self.rows.values()))[:SINK_ROWS]
        self.states = inner(self.model, first)

    def compare(self, folder: Path, texts: set[str], *, rounds_inputs: bool) -> dict[str, Any]:
        """Figures of a quantized folder."""
        candidate = loaded(folder)
        if not rounds_inputs:  # only the weights differ, not the kernels
            candidate = candidate.dequantize()
        found: dict[str, Any] = {"kl": {}, "perplexity": {}, "perplexity_original": {}, "same_top": {}}
        for text, rows in self.rows.items():
            if text not in texts:
                continue
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


class Results:
    """The file of results, one JSON line a run and half."""

    def __init__(self, path: Path, any_commit: bool) -> None:
        self._path, self._any = path, any_commit
        self._lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def missing(self, run: Run, texts: list[str], measured: list[int]) -> list[str]:
        """Texts of which nothing is known."""
        known = {
            text
            for line in self._lines
            if line["run"] == run.named and line["measured"] == measured
            if self._any or line["version"] == run.version
            for text in line["kl"]
        }
        return [text for text in texts if Path(text).stem not in known]

    def add(self, line: dict[str, Any]) -> None:
        """Write a line."""
        self._lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def merged(self) -> list[dict[str, Any]]:
        """The lines, those of one run put together."""
        found: dict[str, dict[str, Any]] = {}
        for line in self._lines:
            key = json.dumps([line[n] for n in ("run", "measured", "version")], sort_keys=True)
            before = found.setdefault(key, line)
            kinds = {k: before[k] | v for k, v in line.items() if isinstance(v, dict) and k != "run"}
            found[key] = before | kinds
        return list(found.values())


def runs_of(args: argparse.Namespace, model: Path) -> list[Run]:
    """All runs of a model."""
    shared = {name: getattr(args, name) for name in ("dataset", "iters", "nsamples", "seqlen")}
    shared |= args.extra
    here = (sys.executable, commit())
    kinds = [(name, *here, shared | more) for name, more in map(recipe, args.ours)]
    if args.peer_python:
        there = (args.peer_python, version_of(args.peer_python))
        peers = (recipe(given, PEER_RECIPES) for given in args.peer)
        kinds += [(f"{PEER} {name}", *there, shared | more) for name, more in peers]
    return [
        Run(package, python, version, model, scheme, seed, tuple(settings.items()))
        for scheme in args.schemes
        for seed in args.seeds
        for package, python, version, settings in kinds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", choices=["dev", "report"], required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--schemes", nargs="+", required=True)
    parser.add_argument("--dev-texts", nargs="+", default=[])
    parser.add_argument("--report-texts", nargs="+", default=[PYTHON_DOCS])
    parser.add_argument("--dataset", required=True, help="calibration data")
    parser.add_argument("--ours", nargs="*", default=[DEFAULT], help="recipes, or NAME={arguments}")
    parser.add_argument("--peer-python", help="Python with the other package; without it only ours runs")
    parser.add_argument(
        "--peer", nargs="*", default=[DEFAULT], help=f"{', '.join(PEER_RECIPES)}, or NAME={{arguments}}"
    )
    parser.add_argument("--any-commit", action="store_true", help="take runs of ours of other commits too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--extra", type=json.loads, default={}, help="JSON of further arguments of both")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of each text that are measured")
    parser.add_argument("--measure-seqlen", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="folder in which quantized folders stay")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy.jsonl")
    parser.add_argument("--draw", type=Path, help="write a picture of these runs")
    args = parser.parse_args()
    measured = [args.tokens, args.measure_seqlen]
    texts = args.dev_texts if args.half == "dev" else args.report_texts
    results = Results(args.out, args.any_commit)
    with torch.no_grad():
        for model in args.models:
            wanted = [
                (run, missing)
                for run in runs_of(args, model)
                if (missing := results.missing(run, texts, measured))
            ]
            original = Original(model, texts, *measured) if wanted else None
            for run, missing in wanted:
                with tempfile.TemporaryDirectory() as passing:
                    made, cost = run.folder(args.keep or Path(passing))
                    names = {Path(text).stem for text in missing}
                    figures = original.compare(made, names, rounds_inputs=run.rounds_inputs)
                results.add({"run": run.named, "measured": measured, **cost, **figures})
    lines = results.merged()
    print(table(lines), against_peer(lines), sep="\n\n")
    if args.draw:
        asked = [run.named for model in args.models for run in runs_of(args, model)]
        draw(args.draw, lines, asked, measured)


if __name__ == "__main__":
    main()
