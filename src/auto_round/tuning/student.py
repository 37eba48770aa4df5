"""What is learned of some blocks, and its gradients from the gradient of what the blocks hand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.facts.flow import States
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import MAX_KNOB, Knobs, Stats
from auto_round.numerics.ste import cast_ste
from auto_round.tuning.distill import DistillConfig, Rate
from auto_round.tuning.samples import leaf, states_of
from auto_round.tuning.sign_round import TunedBlock
from auto_round.tuning.weights import RescaledWeight, Weight, fake_weights

OFFSET, LOW, HIGH, RATIO, CODES, NORM = "v.", "lo.", "hi.", "ratio.", "codes.", "norm."
"""What a name among the values begins with."""
NO_GRID = 8
"""Bits that decide how far norms move where no weight beside them is rounded."""


@dataclass(frozen=True, slots=True)
class RoundedWeights:
    """Weights rounded once for all rows of a step, and the gradients that these rows give them.

    Attributes:
        made: rounded weights and norms, as functions of what is learned.
        used: the same as the blocks compute with them, by name.
        total: sums of their gradients, in the same order; None where no row reached.
    """

    made: tuple[Tensor, ...]
    used: Mapping[str, Tensor]
    total: list[Tensor | None]


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """Some rows that went through blocks, with all that gradients need on their way back.

    Attributes:
        inputs: what flowed in.
        outputs: what flowed out.
    """

    inputs: States
    outputs: States


class Student:
    """Blocks whose weights are rounded, with what is learned of them.

    Attributes:
        weights: parameter of the blocks -> its offsets and knobs, or its codes and what their steps become.
        norms: parameter of one dimension -> its value, float32; empty where norms stay.
        values: everything that is learned, and knobs of ranges that stay, by a prefix and the parameter's
            name; float32, changed in place.
    """

    def __init__(
        self,
        block: nn.Module,
        weights: Mapping[str, Weight | RescaledWeight],
        norms: Mapping[str, Tensor],
        own: Mapping[str, torch.dtype],
    ) -> None:
        """Put together what is learned.

        Args:
            block: runs in its dtypes already.
            weights: parameters to round.
            norms: parameters of one dimension to learn, float32.
            own: dtype in which the model keeps each of those.
        """
        self._block, self._own = block, own
        self.weights, self.norms = weights, norms
        self.values = {NORM + name: value for name, value in norms.items()}
        fixed: set[str] = set()
        for name, weight in weights.items():
            tunable = weight.format.rule.tunable
            if isinstance(weight, RescaledWeight):
                self.values |= {RATIO + name: weight.ratio} if tunable else {}
                continue
            knobs = {LOW + name: weight.knobs.lo, HIGH + name: weight.knobs.hi}
            self.values |= {OFFSET + name: weight.v, **knobs}
            fixed |= set() if tunable else knobs.keys()
        self._learned = [key for key in self.values if key not in fixed]

    def rates(self, config: DistillConfig) -> dict[str, Rate]:
        """How far each of the values moves in a step."""
        found: dict[str, Rate] = {}
        bits = min((weight.format.grid.bits for weight in self.weights.values()), default=NO_GRID)
        for key, value in self.values.items():
            kind, _, name = key.partition(".")
            if kind + "." == NORM:
                found[key] = Rate(config.norm_rate(bits) * float(value.abs().mean()))
                continue
            if kind + "." == OFFSET:
                found[key] = Rate(config.offset_rate)
            else:
                found[key] = Rate(config.range_rate(self.weights[name].format.grid.bits), relative=True)
        return found

    def parameters(self) -> dict[str, Tensor]:
        """Rounded weights and learned norms as the blocks compute with them; no gradient."""
        with torch.no_grad():
            return fake_weights(self.weights) | self._norms()

    def quantize(self) -> dict[str, QTensor]:
        """Codes and scale of each weight."""
        return {name: weight.quantize() for name, weight in self.weights.items()}

    def kept_norms(self) -> dict[str, Tensor]:
        """The norms in the dtype in which the model keeps them."""
        return {name: value.detach().to(self._own[name]) for name, value in self.norms.items()}

    def clamp(self) -> None:
        """Keep range multipliers where they are allowed to be."""
        for key, value in self.values.items():
            if key.startswith((LOW, HIGH, RATIO)):
                value.clamp_(0.0, MAX_KNOB)

    def rounded(self) -> RoundedWeights:
        """Round the weights so that gradients can follow; `gradients` ends what this begins."""
        for key in self._learned:
            self.values[key].requires_grad_(True)
        with torch.enable_grad():
            made = fake_weights(self.weights, hold=True) | self._norms()
        used = {name: value.detach().requires_grad_() for name, value in made.items()}
        return RoundedWeights(tuple(made.values()), used, [None] * len(made))

    def run(self, rounded: RoundedWeights, inputs: States, args: tuple[Any, ...]) -> ForwardPass:
        """Let some rows through.

        Args:
            rounded: the weights.
            inputs: what flows in.
            args: what the blocks are called with behind it.
        """
        leaves = tuple(leaf(state) for state in inputs)
        with torch.enable_grad():
            outputs = functional_call(self._block, dict(rounded.used), (*leaves, *args))
        return ForwardPass(leaves, states_of(outputs, range(len(leaves))))

    def pull_back(
        self, rounded: RoundedWeights, passed: ForwardPass, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of what flowed in; those of the weights are added to what other rows gave.

        Args:
            rounded: the weights.
            passed: some rows.
            gradients: of each tensor that flowed out; None for none.
        """
        floats = [state for state in passed.inputs if state.requires_grad]
        found = _pulled_back(passed.outputs, gradients, [*rounded.used.values(), *floats])
        rounded.total[:] = [_sum(a, b) for a, b in zip(rounded.total, found, strict=False)]
        behind = iter(found[len(rounded.used) :])
        return tuple(next(behind) if state.requires_grad else None for state in passed.inputs)

    def gradients(self, rounded: RoundedWeights) -> dict[str, Tensor]:
        """Gradients of `values` by name, summed over all rows; none of what the rows did not reach."""
        wanted = [self.values[key] for key in self._learned]
        through = _pulled_back(rounded.made, rounded.total, wanted)
        for value in wanted:
            value.requires_grad_(False)
        return {n: g for n, g in zip(self._learned, through, strict=True) if g is not None}

    def _norms(self) -> dict[str, Tensor]:
        """Rounded to what the model keeps, in the dtype in which the blocks run."""
        dtypes = {name: self._block.get_parameter(name).dtype for name in self.norms}
        return {name: cast_ste(v, self._own[name]).to(dtypes[name]) for name, v in self.norms.items()}


@dataclass(frozen=True, slots=True)
class UntunedWeight:
    """A weight and its format, of which nothing is learned yet.

    Attributes:
        format: numeric format, bound to the weight.
        original: the weight as the model has it.
        stats: its measured ranges.
        dtype: dtype in which the block runs.
    """

    format: Format
    original: Tensor
    stats: Stats
    dtype: torch.dtype


def weight_of(name: str, source: UntunedWeight, learned: Mapping[str, Tensor]) -> Weight | RescaledWeight:
    """A weight with what is learned of it, by the names of `Student.values`; codes that are known stay.

    Args:
        name: of the parameter.
        source: the weight.
        learned: of the blocks; with `CODES` where codes stay.
    """
    fmt, stats = source.format, source.stats
    knobs = Knobs(learned[LOW + name], learned[HIGH + name])
    codes = learned.get(CODES + name)
    if codes is None:
        return Weight(fmt, source.original, stats, knobs, learned[OFFSET + name], source.dtype)
    with torch.no_grad():
        scale = fmt.rule_for(stats).fit(stats, fmt.grid, knobs)
    ratio = learned.get(RATIO + name)
    if ratio is None:
        ratio = torch.ones_like(stats.lo)
    return RescaledWeight(fmt, QTensor(codes, scale, fmt), stats, knobs, ratio, source.dtype)


def student_of(tuned: TunedBlock, *, codes_stay: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What tuning of a block found, by the names of `Student.values` and `weight_of`.

    Args:
        tuned: the result.
        codes_stay: codes stay as they are, and range multipliers too.

    Returns:
        What is learned further, and what stays.
    """
    moved = {NORM + name: value.float() for name, value in tuned.others.items()}
    stays: dict[str, Tensor] = {}
    for name, each in tuned.learned.items():
        ranges = {LOW + name: each.knobs.lo, HIGH + name: each.knobs.hi}
        if codes_stay:
            stays |= {**ranges, CODES + name: tuned.weights[name].codes}
        else:
            moved |= {**ranges, OFFSET + name: each.v}
    return moved, stays


def _pulled_back(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients in the inputs of the outputs that have one."""
    pairs = [
        (output, gradient.to(output.dtype))
        for output, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and output.requires_grad
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    reached, seeds = zip(*pairs, strict=True)
    return list(torch.autograd.grad(reached, inputs, seeds, allow_unused=True))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two gradients, in float32."""
    if b is None:
        return a
    return b.float() if a is None else a.add_(b)
