"""Do AutoScheme's plans lose less than uniform schemes, random plans of the same size and another package's?

    python benchmarks/autoscheme.py MODEL... --mixes int mx gguf --seeds 42 1 2 \
        --dataset calibration.jsonl --text evaluation.jsonl --peer-python OTHER/bin/python --tuned 20

A mix is a row of `MIXES`: schemes to choose from, and budgets. Whole numbers have groups of 128, or of 64 in
all of a model that has a row of another length. q/k/v and gate/up share a scheme, in the other package's
plans too, which gets the same options, rows and seed.

Every plan is carried out by optimized rounding of ours, in memory, matrix by matrix, with rounded inputs
where its schemes have them, and compared with the original on rows of another text: KL in nats per token.
Layers in blocks count; of GGUF files head and embedding stay as they are here. `--tuned STEPS` also tunes
AutoScheme's plan, the other package's and the uniform schemes named in the mix, all by us, on the same rows.
`--files q3_k_m q4_k_m` makes GGUF files: llama.cpp's mixture, and the plan of the same file size.

Writes one JSON line a plan; `picks` has one digit a layer, the option it got. What is in the file already is
not measured again, so an interrupted table continues. Ends with tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_tables import markdown
from autoscheme_plans import Bench, Data, Mix, Plan, divergence
from other_python import environment_of
from transformers import AutoModelForCausalLM

from auto_round.autoscheme.plan_file import written
from auto_round.autoscheme.runs import choose_schemes
from auto_round.config import build_options
from auto_round.evaluate.predictors import Opening, open_model
from auto_round.evaluate.subject import find_subject
from auto_round.schemes.scheme import parse_scheme

RANDOM_PLANS = 10
OURS, PEER, UNIFORM, RANDOM = "AutoScheme", "0.16.1", "uniform", "random"
MIXTURE = "llama.cpp's mixture"

MIXES = {
    "int": Mix(("W2A16G64", "W4A16", "W8A16"), (2.5, 3.0, 4.0), ("W2A16G32", "W3A16")),
    "int-near": Mix(("W2A16G64", "W3A16", "W4A16", "W8A16"), (2.5, 3.0, 4.0)),
    "mx": Mix(("MXFP4", "MXFP8"), (5.0, 6.0)),
    "gguf": Mix(("GGUF:Q2_K_S", "GGUF:Q4_K_S"), (3.0,)),
}
FILES = {
    "q3_k_m": "GGUF:Q2_K_S,GGUF:Q3_K_S,GGUF:Q4_K_S,GGUF:Q5_K_S,GGUF:Q6_K",
    "q4_k_m": "GGUF:Q3_K_S,GGUF:Q4_K_S,GGUF:Q5_K_S,GGUF:Q6_K",
}
"""Mixture of llama.cpp -> what to choose from at its file size."""

PEER_SCRIPT = """
import json, sys, time
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
model, given = sys.argv[1], json.loads(sys.argv[2])
options = [QuantizationScheme(**o) if isinstance(o, dict) else o for o in given["options"]]
common = dict(nsamples=given["rows"], seqlen=given["seqlen"], dataset=given["dataset"])
shared = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
scheme = AutoScheme(avg_bits=given["budget"], options=options, shared_layers=shared, batch_size=8, **common)
begin = time.process_time()
run = AutoRound(
    model, scheme=scheme, iters=0, seed=given["seed"], device_map="cpu", disable_model_free=True, **common
)
run.post_init()
bits = {n: (s if isinstance(s, dict) else vars(s))["bits"] for n, s in run.layer_config.items()}
print("PLAN " + json.dumps({"bits": bits, "cpu_s": round(time.process_time() - begin, 1)}))
"""
CLI = "from auto_round.cli.main import main; raise SystemExit(main())"
TUNE_SCRIPT = """
import json, sys
from auto_round import AutoRound
AutoRound(sys.argv[1], device_map="cpu", **json.loads(sys.argv[3])).quantize_and_save(sys.argv[2])
"""


class Results:
    """The file of results, one JSON line a plan."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The line of a plan; None where it was not measured."""
        return next((line for line in self.lines if key.items() <= line.items()), None)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write a line."""
        self.lines.append(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line


@dataclass
class Table:
    """All plans of one model, mix and seed."""

    name: str
    bench: Bench
    args: argparse.Namespace
    results: Results

    def run(self) -> None:
        """Measure what is missing."""
        bench = self.bench
        for name in (*bench.mix.options, *bench.mix.beside):
            self.measured(UNIFORM, name, lambda name=name: (bench.uniform(name), {}))
        for budget in bench.mix.budgets:
            ours = self.measured(OURS, f"{budget:g} bits", lambda b=budget: self._ours(b))
            if self.args.peer_python:
                self.measured(PEER, f"{budget:g} bits", lambda b=budget: self._peer(b))
            for number in range(RANDOM_PLANS):
                plan = bench.random_plan(ours["bits"], number)
                self.measured(RANDOM, f"{budget:g} bits, {number}", lambda plan=plan: (plan, {}))
        if self.args.tuned:
            self._tuned(self.args.tuned)

    def measured(
        self, what: str, name: str, make: Callable[[], tuple[Plan, dict[str, Any]]]
    ) -> dict[str, Any]:
        """Size and divergence of a plan, known or measured now; `make` gives the plan and what it cost."""
        key = self._key(what, name)
        if found := self.results.find(key):
            return found
        plan, cost = make()
        bench = self.bench
        picks = {} if what == UNIFORM else {"picks": bench.picks(plan)}
        figures = {"bits": round(bench.bits(plan), 4), "kl": round(bench.kl(plan), 5)}
        return self.results.add(key | figures | cost | picks)

    def _key(self, what: str, name: str, steps: int = 0) -> dict[str, Any]:
        where = {"model": self.bench.folder.name, "mix": self.name, "seed": self.bench.seed}
        return where | of_data(self.bench.data) | {"what": what, "name": name, "steps": steps}

    def _ours(self, budget: float) -> tuple[Plan, dict[str, Any]]:
        bench, data = self.bench, self.bench.data
        begin = time.process_time()
        given = {
            "model": str(bench.folder),
            "output_dir": "unused",
            "scheme_options": [self._option(name) for name in bench.mix.options],
            "avg_bits": budget,
            "dataset": data.dataset,
            "seed": bench.seed,
            "iters": 0,
            "disable_opt_rtn": False,
            "score_method": self.args.method,
            "score_nsamples": data.rows,
            "score_seqlen": data.seqlen,
        }
        (run,) = choose_schemes(build_options(given))
        chosen = {} if run.chosen is None else run.chosen["layer_config"]
        found = {n: parse_scheme(chosen[n]) for n in bench.layers}
        cost = {"cpu_s": round(time.process_time() - begin, 1)}
        return {n: s if s.quantized else None for n, s in found.items()}, cost

    def _option(self, name: str) -> str | dict[str, Any]:
        """An option as both packages take it: a preset, or fields where groups are smaller."""
        scheme = self.bench.scheme(name)
        if scheme == parse_scheme(name):
            return name
        return {field: getattr(scheme, field) for field in ("bits", "group_size", "sym", "data_type")}

    def _peer(self, budget: float) -> tuple[Plan, dict[str, Any]]:
        bench, data = self.bench, self.bench.data
        given = {
            "options": [self._option(name) for name in bench.mix.options],
            "budget": budget,
            "dataset": data.dataset,
            "rows": data.rows,
            "seqlen": data.seqlen,
            "seed": bench.seed,
        }
        # It keeps scores without regard to the seed, which picks the rows.
        cache = Path.home() / ".cache" / "auto_round_bench" / f"rows-of-seed-{bench.seed}"
        given_to = (PEER_SCRIPT, str(bench.folder), json.dumps(given))
        said = child(self.args.peer_python, *given_to, AR_AUTO_SCHEME_CACHE=str(cache))
        told = json.loads(next(x for x in said.splitlines() if x.startswith("PLAN ")).removeprefix("PLAN "))
        names = {bench.scheme(name).bits: number for number, name in enumerate(bench.mix.options)}
        picks = "".join(str(names.get(told["bits"][name], "-")) for name in bench.layers)
        return bench.plan_of(picks), {"cpu_s": told["cpu_s"]}

    def _tuned(self, steps: int) -> None:
        """Tune the plans; one run each, in a process of its own."""
        bench = self.bench
        plans = [(UNIFORM, name) for name in bench.mix.beside]
        plans += [(what, f"{b:g} bits") for b in bench.mix.budgets for what in (OURS, PEER)]
        for what, name in plans:
            before, key = self.results.find(self._key(what, name)), self._key(what, name, steps)
            if before is None or self.results.find(key):
                continue
            plan = bench.uniform(name) if what == UNIFORM else bench.plan_of(before["picks"])
            rules = {n: written(scheme) for n, scheme in plan.items()}
            given = {"layer_config": rules, "iters": steps, "seed": bench.seed, "dataset": bench.data.dataset}
            given |= {"nsamples": bench.data.rows, "seqlen": bench.data.seqlen, "verify": False}
            with tempfile.TemporaryDirectory() as out:
                child(sys.executable, TUNE_SCRIPT, str(bench.folder), out, json.dumps(given))
                folder = next(path.parent for path in Path(out).rglob("config.json"))
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
                kl = divergence(model.dequantize(), bench.references)
            self.results.add(key | {"bits": before["bits"], "kl": round(kl, 5)})


def files(bench: Bench, mixture: str, results: Results) -> None:
    """A GGUF file of llama.cpp's mixture, and AutoScheme's of its size, both rounded by us."""
    data = bench.data
    where = {"model": bench.folder.name, "mix": f"file {mixture}", "seed": bench.seed} | of_data(data)
    command = [str(bench.folder), "--format", f"gguf:{mixture}", "--iters", "0", "--device", "cpu"]
    command += ["--dataset", data.dataset, "--seed", str(bench.seed), "--no_verify"]
    command += ["--nsamples", str(data.rows), "--seqlen", str(data.seqlen)]
    for what in (MIXTURE, OURS):
        key = where | {"what": what, "name": mixture, "steps": 0}
        if results.find(key):
            continue
        mine = []
        if what == OURS:
            size = (results.find(where | {"what": MIXTURE}) or {})["bytes"]
            mine = ["--target_size", f"{size}B", "--options", FILES[mixture]]
            mine += ["--score_nsamples", str(data.rows), "--score_seqlen", str(data.seqlen)]
        with tempfile.TemporaryDirectory() as out:
            child(sys.executable, CLI, *command, *mine, "--output_dir", out)
            file = next(Path(out).rglob("*.gguf"))
            model = open_model(find_subject(str(file)), Opening(torch.float32, beside=bench.folder))
            kl, nbytes = divergence(model, bench.references), file.stat().st_size
        bits = round(nbytes * 8 / sum(p.numel() for p in bench.model.parameters()), 4)
        results.add(key | {"bits": bits, "bytes": nbytes, "kl": round(kl, 5)})


def of_data(data: Data) -> dict[str, Any]:
    """What data say of a line."""
    return {"rows": data.rows, "seqlen": data.seqlen, "text": Path(data.text).stem}


def child(python: str, script: str, *arguments: str, **environment: str) -> str:
    """Run a script; returns what it printed."""
    command = [python, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_of(python) | environment)
    if done.returncode:
        sys.exit(f"{python} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def summary(lines: Iterable[Mapping[str, Any]]) -> str:
    """The results in Markdown: a row for each budget, the best of the random plans in one figure."""
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    best: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for line in lines:
        name, number = (*line["name"].split(", "), "")[:2]
        where = (*(str(line[x]) for x in ("model", "mix", "seed", "text")), name, str(line["steps"] or "no"))
        if number:
            best[where] = min(best.get(where, line), line, key=lambda x: x["kl"])
        else:
            rows.setdefault(where, {})[line["what"]] = [f"{line['kl']:.4f} ({line['bits']:.3f})"]
    for where, line in best.items():
        rows.setdefault(where, {})[RANDOM] = [f"{line['kl']:.4f} ({line['bits']:.3f})"]
    kinds = (OURS, PEER, RANDOM, MIXTURE, UNIFORM)
    head = ["model", "mix", "seed", "text", "budget", "tuning steps", *kinds]
    table = [head, ["---"] * len(head)]
    table += [[*where, *("".join(found.get(kind, [])) for kind in kinds)] for where, found in rows.items()]
    return markdown(table)


def main() -> None:
    """Read the command line and measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--mixes", nargs="*", choices=list(MIXES), default=["int"])
    parser.add_argument("--files", nargs="*", choices=list(FILES), default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--dataset", required=True, help="calibration data")
    parser.add_argument("--text", required=True, help="held-out data, another text")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--method", default="fisher", help="how AutoScheme scores")
    parser.add_argument("--peer-python", help="Python with the other package")
    parser.add_argument("--tuned", type=int, default=0, help="also tune the plans for so many steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "autoscheme.jsonl")
    args = parser.parse_args()
    results, data = Results(args.out), Data(args.dataset, args.text, args.rows, args.seqlen)
    for model in args.models:
        for seed in args.seeds:
            for name in args.mixes:
                Table(name, Bench(model, MIXES[name], data, seed), args, results).run()
            for mixture in args.files:
                files(Bench(model, MIXES["gguf"], data, seed), mixture, results)
    print(summary(results.lines))


if __name__ == "__main__":
    main()
