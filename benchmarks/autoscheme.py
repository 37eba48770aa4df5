"""Do AutoScheme's plans lose less than uniform schemes and random plans of the same size?

    python benchmarks/autoscheme.py MODEL --dataset calibration.jsonl --text evaluation.jsonl \
        --options W2A16G64,W4A16,W8A16 --avg_bits 2.5,3,4 --seeds 42 1 2 --out results.jsonl

Every plan is carried out by optimized rounding, in memory, matrix by matrix, with rounded inputs where its
schemes have them, and compared with the original on rows of another text: KL in nats per token. Layers in
blocks count; of GGUF files head and embedding stay as they are here. `--plan FILE` adds plans that others
made, JSON of layer -> fields of a scheme. One JSON line a plan.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.autoscheme.groups import group_layers
from auto_round.autoscheme.runs import choose_schemes
from auto_round.calibration.observe import observe_inputs
from auto_round.calibration.rows import load_rows
from auto_round.config import build_options
from auto_round.evaluate.logits import Comparison
from auto_round.facts.layer import Layer
from auto_round.models.folder import FolderSource
from auto_round.numerics.importance import Importance
from auto_round.numerics.search import THOROUGH
from auto_round.schemes.make import PlanRequest, make_plan
from auto_round.schemes.scheme import QuantizationScheme, parse_scheme
from auto_round.schemes.shapes import awkward_shape
from auto_round.tuning.quantized_inputs import quantized_inputs
from auto_round.tuning.settings import PLAIN_FROM_BITS
from auto_round.tuning.weights import round_to_nearest

Plan = Mapping[str, QuantizationScheme | None]
BATCH = 2
RANDOM_PLANS = 10


@dataclass
class Bench:
    """A model whose layers can be replaced by rounded ones."""

    folder: Path
    held_out: Tensor
    calibration: Tensor
    made: dict[tuple[str, QuantizationScheme], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source = FolderSource.open(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        inside = [x for x in self.source.layers if x.block is not None]
        self.layers: dict[str, Layer] = {x.name: x for x in inside if awkward_shape(x.shape) is None}
        self.originals = {n: self.model.get_parameter(x.parameter).data for n, x in self.layers.items()}
        modules = [x.parameter.removesuffix(".weight") for x in self.layers.values()]
        with observe_inputs(self.model, modules) as seen, torch.no_grad():
            for rows in self.calibration.split(BATCH):
                self.model(rows)
        self.importance: dict[str, Importance | None] = {
            n: seen[x.parameter.removesuffix(".weight")].importance() for n, x in self.layers.items()
        }
        with torch.no_grad():
            self.references = [self.model(rows).logits for rows in self.held_out.split(BATCH)]

    def uniform(self, scheme: str) -> Plan:
        """Every layer under one scheme."""
        plan = make_plan(
            self.source.layers,
            PlanRequest(scheme=scheme),
            blocks=self.source.blocks,
            tied_head=self.source.tied_head,
        )
        return {name: plan.scheme_of(name) for name in self.layers}

    def bits(self, plan: Plan) -> float:
        """Stored bits per weight."""
        total = sum(x.shape[0] * x.shape[1] for x in self.layers.values())
        return sum(self._bits(name, scheme) for name, scheme in plan.items()) / total

    def kl(self, plan: Plan) -> float:
        """Divergence from the original, nats per token."""
        for name, scheme in plan.items():
            self._put(name, self.originals[name] if scheme is None else self._rounded(name, scheme))
        found = Comparison()
        inputs = {
            self.layers[name].parameter.removesuffix(".weight"): fmt
            for name, scheme in plan.items()
            if scheme is not None and (fmt := scheme.activation_format()) is not None
        }
        with quantized_inputs(self.model, inputs), torch.no_grad():
            for rows, reference in zip(self.held_out.split(BATCH), self.references, strict=True):
                logits = self.model(rows).logits
                for row, before, after in zip(rows, reference, logits, strict=True):
                    found.add(before[:-1], after[:-1], row[1:])
        for name in plan:
            self._put(name, self.originals[name])
        return found.kl

    def random_plans(self, options: Sequence[Plan], budget: float, seed: int) -> Iterator[Plan]:
        """Plans that raise groups in a random order for as long as they fit."""
        groups = group_layers(self.source.layers, list(self.layers))
        rising = sorted(options, key=self.bits)
        for number in range(RANDOM_PLANS):
            picks = [0] * len(groups)
            order = list(range(len(groups))) * (len(rising) - 1)
            random.Random(f"{seed}/{number}").shuffle(order)
            for group in order:
                if picks[group] + 1 < len(rising):
                    picks[group] += 1
                    if self.bits(self._plan(groups, rising, picks)) > budget:
                        picks[group] -= 1
            yield self._plan(groups, rising, picks)

    def _plan(self, groups: Sequence[Sequence[str]], options: Sequence[Plan], picks: Sequence[int]) -> Plan:
        return {
            name: options[pick][name] for names, pick in zip(groups, picks, strict=True) for name in names
        }

    def _bits(self, name: str, scheme: QuantizationScheme | None) -> float:
        shape = self.layers[name].shape
        fmt = None if scheme is None else scheme.weight_format()
        return shape[0] * shape[1] * (16 if fmt is None else fmt.bits_per_weight(shape))

    def _rounded(self, name: str, scheme: QuantizationScheme) -> Tensor:
        key = name, scheme
        if key not in self.made:
            effort = THOROUGH if scheme.bits < PLAIN_FROM_BITS else None
            fmt = scheme.weight_format()
            q = round_to_nearest(self.originals[name], fmt, self.importance[name], effort)
            self.made[key] = fmt.dequantize(q)
        return self.made[key]

    def _put(self, name: str, weight: Tensor) -> None:
        self.model.get_parameter(self.layers[name].parameter).data = weight


def main() -> None:
    """Read the command line and print a line for each plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--dataset", required=True, help="calibration data")
    parser.add_argument("--text", required=True, help="held-out data, another text")
    parser.add_argument("--options", default="W2A16G64,W4A16,W8A16")
    parser.add_argument("--avg_bits", default="2.5,3,4")
    parser.add_argument("--methods", default="fisher", help="comma list of score methods")
    parser.add_argument("--uniform", default="", help="further uniform schemes, comma list")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--plan", type=Path, nargs="*", default=[], help="plans of others, JSON")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for seed in args.seeds:
        for line in lines(args, tokenizer, seed):
            text = json.dumps({"model": args.model.name, "seed": seed, **line})
            print(text, flush=True)
            with args.out.open("a") as file:
                file.write(text + "\n")


def lines(args: argparse.Namespace, tokenizer: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Results of one seed."""
    bench = Bench(
        args.model,
        tokens(args.text, tokenizer, args, seed=7),
        tokens(args.dataset, tokenizer, args, seed=seed),
    )
    names = list(dict.fromkeys([*args.options.split(","), *filter(None, args.uniform.split(","))]))
    uniform = {name: bench.uniform(name) for name in names}
    for name, plan in uniform.items():
        yield measured(bench, "uniform", name, plan)
    for path in args.plan:
        made = {
            n: parse_scheme(s, base=parse_scheme("W4A16")) for n, s in json.loads(path.read_text()).items()
        }
        yield measured(bench, "plan", path.stem, made)
    budgets = [float(bits) for bits in args.avg_bits.split(",")]
    reached = dict.fromkeys(budgets, 0.0)  # of layers in blocks: of GGUF files the head counts, too
    for method in args.methods.split(","):
        begin = time.perf_counter()
        chosen = choose_schemes(
            build_options(
                {
                    "model": str(args.model),
                    "output_dir": "unused",
                    "scheme_options": args.options,
                    "avg_bits": budgets,
                    "dataset": args.dataset,
                    "seed": seed,
                    "iters": 0,
                    "disable_opt_rtn": False,
                    "score_method": method,
                    "score_nsamples": args.rows,
                    "score_seqlen": args.seqlen,
                }
            )
        )
        yield {"what": "scores", "name": method, "seconds": round(time.perf_counter() - begin, 1)}
        for budget, run in zip(budgets, chosen, strict=True):
            if run.chosen is not None:
                rules = run.chosen["layer_config"].items()
                schemes = ((n, parse_scheme(v)) for n, v in rules if n in bench.layers)
                plan = {n: s if s.quantized else None for n, s in schemes}
                yield measured(bench, method, run.chosen["target"], plan)
                reached[budget] = max(reached[budget], bench.bits(plan))
    for budget in reached.values():
        options = [uniform[name] for name in args.options.split(",")]
        found = [measured(bench, "random", "", p) for p in bench.random_plans(options, budget, seed)]
        yield {
            **min(found, key=lambda line: line["kl"]),
            "name": f"best of {len(found)} at {budget:.4g} bits",
        }


def tokens(data: str, tokenizer: Any, args: argparse.Namespace, *, seed: int) -> Tensor:
    """Rows `[rows, length]`."""
    rows = load_rows(data, tokenizer, nsamples=args.rows, seqlen=args.seqlen, seed=seed).rows
    return torch.stack([row.tokens for row in rows])


def measured(bench: Bench, what: str, name: str, plan: Plan) -> dict[str, Any]:
    """Size and divergence of a plan."""
    return {"what": what, "name": name, "bits": round(bench.bits(plan), 4), "kl": round(bench.kl(plan), 5)}


if __name__ == "__main__":
    main()
