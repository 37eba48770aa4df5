"""A model whose layers can be rounded each by a scheme of its own, for `autoscheme.py`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.autoscheme.groups import group_layers
from auto_round.autoscheme.plan_file import written
from auto_round.calibration.observe import observe_inputs
from auto_round.calibration.rows import load_rows
from auto_round.evaluate.logits import Comparison
from auto_round.facts.layer import Layer
from auto_round.models.folder import FolderSource
from auto_round.numerics.importance import Importance
from auto_round.numerics.search import THOROUGH
from auto_round.schemes.make import make_plan
from auto_round.schemes.plan import PlanRequest
from auto_round.schemes.scheme import QuantizationScheme, parse_scheme
from auto_round.schemes.shapes import awkward_shape
from auto_round.tuning.quantized_inputs import quantized_inputs
from auto_round.tuning.settings import PLAIN_FROM_BITS
from auto_round.tuning.weights import round_to_nearest

Plan = Mapping[str, QuantizationScheme | None]
BATCH = 2


@dataclass(frozen=True)
class Data:
    """What is read.

    Attributes:
        dataset: calibration data.
        text: held-out data, another text.
        rows: of each.
        seqlen: tokens of a row.
    """

    dataset: str
    text: str
    rows: int
    seqlen: int


@dataclass(frozen=True)
class Mix:
    """Schemes to choose from.

    Attributes:
        options: their names.
        budgets: bits per weight.
        beside: uniform schemes to compare with, beside the options.
    """

    options: tuple[str, ...]
    budgets: tuple[float, ...]
    beside: tuple[str, ...] = ()


@dataclass
class Bench:
    """A model whose layers can be replaced by rounded ones.

    Attributes:
        folder: of the model.
        mix: what is chosen from.
        data: what is read.
        seed: of calibration rows.
    """

    folder: Path
    mix: Mix
    data: Data
    seed: int
    made: dict[tuple[str, QuantizationScheme], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source = FolderSource.open(self.folder)
        inside = [x for x in self.source.layers if x.block is not None]
        self.layers: dict[str, Layer] = {x.name: x for x in inside if awkward_shape(x.shape) is None}

    @cached_property
    def model(self) -> Any:
        """In float32."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def originals(self) -> dict[str, Tensor]:
        """Weights of the layers."""
        return {n: self.model.get_parameter(x.parameter).data for n, x in self.layers.items()}

    @cached_property
    def importance(self) -> dict[str, Importance | None]:
        """Second moments of inputs."""
        modules = [x.parameter.removesuffix(".weight") for x in self.layers.values()]
        with observe_inputs(self.model, modules) as seen, torch.no_grad():
            for rows in self.tokens(self.data.dataset, self.seed).split(BATCH):
                self.model(rows)
        return {n: seen[x.parameter.removesuffix(".weight")].importance() for n, x in self.layers.items()}

    @cached_property
    def references(self) -> list[tuple[Tensor, Tensor]]:
        """Held-out rows and the original's logits."""
        with torch.no_grad():
            return [(r, self.model(r).logits) for r in self.tokens(self.data.text, 7).split(BATCH)]

    def tokens(self, data: str, seed: int) -> Tensor:
        """Rows `[rows, length]`."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        found = load_rows(data, tokenizer, nsamples=self.data.rows, seqlen=self.data.seqlen, seed=seed).rows
        return torch.stack([row.tokens for row in found])

    def scheme(self, name: str) -> QuantizationScheme:
        """A preset, with groups that fit every layer."""
        found = parse_scheme(name)
        fits = all(x.shape[1] % found.group_size == 0 for x in self.layers.values())
        return found if fits or found.data_type != "int" else parse_scheme(name, {"group_size": 64})

    def uniform(self, name: str) -> Plan:
        """Every layer under one scheme."""
        plan = make_plan(
            self.source.layers,
            PlanRequest(scheme=self.scheme(name)),
            blocks=self.source.blocks,
            tied_head=self.source.tied_head,
        )
        return {name: plan.scheme_of(name) for name in self.layers}

    @cached_property
    def options(self) -> list[Plan]:
        """Uniform plans of the options."""
        return [self.uniform(name) for name in self.mix.options]

    def bits(self, plan: Plan) -> float:
        """Stored bits per weight."""
        total = sum(x.shape[0] * x.shape[1] for x in self.layers.values())
        return sum(self._bits(name, scheme) for name, scheme in plan.items()) / total

    def kl(self, plan: Plan) -> float:
        """Divergence from the original, nats per token."""
        references = self.references
        for name, scheme in plan.items():
            self._put(name, self.originals[name] if scheme is None else self._rounded(name, scheme))
        inputs = {
            self.layers[name].parameter.removesuffix(".weight"): fmt
            for name, scheme in plan.items()
            if scheme is not None and (fmt := scheme.activation_format()) is not None
        }
        with quantized_inputs(self.model, inputs):
            found = divergence(self.model, references)
        for name in plan:
            self._put(name, self.originals[name])
        return found

    def random_plan(self, budget: float, number: int) -> Plan:
        """A plan that raises groups in a random order for as long as they fit."""
        groups = group_layers(self.source.layers, list(self.layers))
        rising = sorted(self.options, key=self.bits)
        picks = [0] * len(groups)
        order = list(range(len(groups))) * (len(rising) - 1)
        random.Random(f"{self.seed}/{number}").shuffle(order)
        for group in order:
            if picks[group] + 1 < len(rising):
                picks[group] += 1
                if self.bits(self._plan(groups, rising, picks)) > budget:
                    picks[group] -= 1
        return self._plan(groups, rising, picks)

    def picks(self, plan: Plan) -> str:
        """The option of each layer, a digit each; `-` for a layer that is kept."""
        return "".join("-" if plan[n] is None else str(self._index(n, plan[n])) for n in self.layers)

    def plan_of(self, picks: str) -> Plan:
        """The plan of what `picks` wrote."""
        pairs = zip(self.layers, picks, strict=True)
        return {n: None if pick == "-" else self.options[int(pick)][n] for n, pick in pairs}

    def _index(self, name: str, scheme: QuantizationScheme | None) -> int:
        """Which option gives a layer this scheme."""
        return [written(option[name]) for option in self.options].index(written(scheme))

    def _plan(self, groups: Sequence[Sequence[str]], options: Sequence[Plan], picks: Sequence[int]) -> Plan:
        found = {n: options[pick][n] for names, pick in zip(groups, picks, strict=True) for n in names}
        return {name: found[name] for name in self.layers}

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


def divergence(model: Any, references: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean KL(original || model) on rows whose original's logits are known."""
    found = Comparison()
    with torch.no_grad():
        for rows, before in references:
            for row, first, second in zip(rows, before, model(rows).logits, strict=True):
                found.add(first[:-1], second[:-1], row[1:])
    return found.kl
