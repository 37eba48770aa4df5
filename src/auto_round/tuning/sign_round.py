"""SignRound: learn how each weight of a block is rounded, against the block's own output.

Notation of arXiv 2309.05516: V are rounding offsets in units of the step, the knobs are its alpha and beta.
The block is called with substituted weights (`torch.func.functional_call`); nothing is attached to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.errors import ConfigError, NumericsError
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import MAX_KNOB, Knobs, Stats
from auto_round.numerics.search import QUICK, THOROUGH, Effort, search_knobs
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.objective import block_loss
from auto_round.tuning.samples import Samples, first_output
from auto_round.tuning.steps import make_stepper, step_factor

Objective = Callable[..., Tensor]
"""`block_objective`, or something that gives the same for the same arguments."""

LOOKS = 10
"""How many times the held-out loss is looked at during a run."""
STEPS_BETWEEN_LOOKS = 10
"""Fewest steps between two looks: each costs about as much as a step. The last step is always looked at."""


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """Result of tuning one block.

    Attributes:
        weights: quantized parameters by dotted name.
        others: retrained norm weights and biases by dotted name, in the parameter's dtype.
        initial_loss: held-out loss of the starting point.
        loss: held-out loss of what is returned.
        best_step: step that was kept; 0 is the starting point.
    """

    weights: Mapping[str, QTensor]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    initial_loss: float = math.nan
    loss: float = math.nan
    best_step: int = 0


@dataclass(frozen=True, slots=True)
class WeightTask:
    """One weight to quantize.

    Attributes:
        format: numeric format.
        original: the weight, where it is held more exactly than the block runs; None for the block's own.
        importance: mean square of each input channel `[in]`, for the range search; None weighs all alike.
    """

    format: Format
    original: Tensor | None = None
    importance: Tensor | None = None


@dataclass(slots=True)
class _Weight:
    """One weight under tuning."""

    format: Format
    original: Tensor
    stats: Stats
    knobs: Knobs
    v: Tensor
    dtype: torch.dtype

    def fake(self) -> Tensor:
        """The weight as it would come back from its codes, in the dtype that the block runs in."""
        return self.format.fake_quantize(self.original, self.stats, self.knobs, self.v).to(self.dtype)

    def quantize(self) -> QTensor:
        with torch.no_grad():
            return self.format.quantize(self.original, self.knobs, self.v)


def round_to_nearest(
    w: Tensor, fmt: Format, importance: Tensor | None = None, effort: Effort | None = None
) -> QTensor:
    """Quantize without tuning; with `effort`, in the range of smallest importance-weighted error."""
    knobs = None if effort is None else search_knobs(fmt, w, importance, effort)
    return fmt.quantize(w, knobs)


def block_objective(
    block: nn.Module,
    weights: Mapping[str, _Weight],
    others: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Loss of a block whose weights are fake-quantized: everything that a tuning step differentiates.

    Args:
        block: the module.
        weights: weights under tuning by parameter name.
        others: retrained parameters by name, float32.
        args: hidden states `[batch, length, hidden]` and what else is positional.
        kwargs: keyword arguments.
        target: what the unquantized block gives.
        mask: `[batch, length]` bool; None where every position counts.

    Returns:
        Scalar float32.
    """
    parameters = {name: weight.fake() for name, weight in weights.items()}
    parameters.update({name: value.to(args[0].dtype) for name, value in others.items()})
    return block_loss(first_output(functional_call(block, parameters, args, kwargs)), target, mask)


def tune_block(
    block: nn.Module,
    tasks: Mapping[str, WeightTask],
    samples: Samples,
    held_out: Samples,
    config: TuneConfig,
    *,
    generator: torch.Generator,
    objective: Objective = block_objective,
) -> TunedBlock:
    """Quantize the weights of one block so that its output changes least.

    Args:
        block: any module whose first positional argument is hidden states; not modified.
        tasks: parameter name inside the block -> what to do with it.
        samples: what to tune on.
        held_out: what parameters are chosen by; never trained on. Where it is empty `samples` choose.
        config: settings of the loop.
        generator: source of the order of samples (on the host).
        objective: what is differentiated, for example a compiled `block_objective`.

    Raises:
        ConfigError: there is nothing to tune on.
        NumericsError: weights or the loss are not finite.
    """
    effort = (QUICK if config.iters else THOROUGH) if config.search else None
    weights = {name: _prepare(block, name, task, effort) for name, task in tasks.items()}
    if not config.iters or not weights:
        return TunedBlock({n: w.quantize() for n, w in weights.items()})
    if not len(samples):
        raise ConfigError("no samples to tune on: give some, or iters=0 to round without tuning")
    with torch.enable_grad():
        return _Loop(block, weights, samples, held_out or samples, config, generator, objective).run()


def _prepare(block: nn.Module, name: str, task: WeightTask, effort: Effort | None) -> _Weight:
    original = block.get_parameter(name).detach() if task.original is None else task.original
    fmt = task.format
    try:
        stats = fmt.stats(original)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from None
    if effort is None:
        knobs = Knobs(torch.ones_like(stats.lo), torch.ones_like(stats.hi))
    else:
        knobs = search_knobs(fmt, original, task.importance, effort)
    v = torch.zeros_like(original, dtype=torch.float32)
    return _Weight(fmt, original, stats, knobs, v, block.get_parameter(name).dtype)


class _Loop:
    """State of one tuning loop."""

    def __init__(
        self,
        block: nn.Module,
        weights: dict[str, _Weight],
        samples: Samples,
        held_out: Samples,
        config: TuneConfig,
        generator: torch.Generator,
        objective: Objective,
    ) -> None:
        self._block, self._weights, self._config = block, weights, config
        self._samples, self._held_out, self._generator = samples, held_out, generator
        self._device = next(iter(weights.values())).original.device
        self._objective = objective
        self._others = _other_parameters(block, weights) if config.tune_norm_bias else {}
        self._offsets = [w.v for w in weights.values()] if config.tune_rounding else []
        self._ranges = (
            [k for w in weights.values() for k in (w.knobs.lo, w.knobs.hi)] if config.tune_range else []
        )
        self._trained = [*self._offsets, *self._ranges, *self._others.values()]
        for p in self._trained:
            p.requires_grad_(True)
        self._order: list[int] = []

    def run(self) -> TunedBlock:
        config = self._config
        stepper = make_stepper(config, self._offsets, self._ranges, list(self._others.values()))
        best_loss = loss = initial = self._held_out_loss()
        best_step, done = 0, 0
        best = self._snapshot() if config.keep_best else None
        look_every = max(STEPS_BETWEEN_LOOKS, config.iters // LOOKS)
        for step in range(config.iters):
            gradients = self._gradients()
            with torch.no_grad():
                stepper.step(gradients, step_factor(config, step))
                for knob in self._ranges:
                    knob.clamp_(0.0, MAX_KNOB)
            done = step + 1
            if done % look_every and done != config.iters:
                continue
            loss = self._held_out_loss()
            if loss < best_loss:
                best_loss, best_step = loss, done
                best = self._snapshot() if config.keep_best else None
            elif config.patience and done - best_step >= config.patience:
                break
        if best is not None:
            self._restore(best)
            loss, done = best_loss, best_step
        return TunedBlock(
            {n: w.quantize() for n, w in self._weights.items()},
            {n: p.detach().to(self._block.get_parameter(n).dtype) for n, p in self._others.items()},
            initial,
            loss,
            done,
        )

    def _call(self, samples: Samples, index: Sequence[int], objective: Objective) -> Tensor:
        """Loss of the block with fake-quantized weights on some samples."""
        args, kwargs = samples.arguments(index)
        pick = torch.as_tensor(index)
        return objective(
            self._block,
            self._weights,
            self._others,
            (samples.inputs[pick].to(self._device), *args),
            dict(kwargs),
            samples.targets[pick].to(self._device),
            None if samples.masks is None else samples.masks[pick].to(self._device),
        )

    def _gradients(self) -> list[Tensor | None]:
        total: list[Tensor | None] = [None] * len(self._trained)
        for _ in range(self._config.accumulate):
            loss = self._call(self._samples, self._next_batch(), self._objective)
            self._check(float(loss.detach()))
            # A parameter that the batch did not reach (an expert without tokens) has no gradient.
            found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, self._trained, allow_unused=True)
            total = [_add(a, b) for a, b in zip(total, found, strict=True)]
        return total

    def _next_batch(self) -> list[int]:
        size = min(self._config.batch_size, len(self._samples))
        if len(self._order) < size:
            self._order = torch.randperm(len(self._samples), generator=self._generator).tolist()
        batch, self._order = self._order[:size], self._order[size:]
        return sorted(batch)

    def _held_out_loss(self) -> float:
        """Mean loss over all held-out samples with the parameters as they are."""
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(self._held_out), self._config.batch_size):
                index = range(start, min(start + self._config.batch_size, len(self._held_out)))
                total += float(self._call(self._held_out, index, block_objective)) * len(index)
        return self._check(total / max(1, len(self._held_out)))

    def _check(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise NumericsError(
                f"the block's loss became {loss}: its inputs or outputs overflow; "
                "try a wider model dtype (--model_dtype fp32 or bf16)"
            )
        return loss

    def _snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._trained]

    def _restore(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self._trained, values, strict=True):
                p.copy_(value)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _other_parameters(block: nn.Module, weights: Mapping[str, _Weight]) -> dict[str, Tensor]:
    """Norm weights and biases (everything of one dimension) as float32 copies."""
    return {
        n: p.detach().float().clone()
        for n, p in block.named_parameters()
        if p.dim() == 1 and n not in weights
    }
