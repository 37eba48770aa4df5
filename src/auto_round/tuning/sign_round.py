"""SignRound: learn how each weight of a block is rounded, against the block's own output.

Notation of arXiv 2309.05516: V are rounding offsets in units of the step, the knobs are its alpha and beta.
The block is called with substituted weights (`torch.func.functional_call`); nothing is attached to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from auto_round.errors import ConfigError, NumericsError
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import MAX_KNOB
from auto_round.numerics.search import QUICK, THOROUGH
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.objective import PLAIN, Objective
from auto_round.tuning.samples import Batch, Samples
from auto_round.tuning.steps import batch_rows, held_out_looks, make_stepper, step_factor
from auto_round.tuning.weights import Weight, WeightTask, fake_weights


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


def tune_block(
    block: nn.Module,
    tasks: Mapping[str, WeightTask],
    samples: Samples,
    held_out: Samples,
    config: TuneConfig,
    *,
    generator: torch.Generator,
    objective: Objective = PLAIN,
) -> TunedBlock:
    """Quantize the weights of one block so that its output changes least.

    Args:
        block: any module that is called with what flows first; not modified.
        tasks: parameter name inside the block -> what to do with it.
        samples: what to tune on.
        held_out: what parameters are chosen by; never trained on. Where it is empty `samples` choose.
        config: settings of the loop.
        generator: source of the order of samples (on the host).
        objective: what is differentiated, for example compiled.

    Raises:
        ConfigError: there is nothing to tune on.
        NumericsError: weights or the loss are not finite.
    """
    effort = (QUICK if config.iters else THOROUGH) if config.search else None
    weights = {name: Weight.of(block, name, task, effort) for name, task in tasks.items()}
    if not config.iters or not weights:
        return TunedBlock({n: w.quantize() for n, w in weights.items()})
    if not len(samples):
        raise ConfigError("no samples to tune on: give some, or iters=0 to round without tuning")
    with torch.enable_grad():
        return _Loop(block, weights, samples, held_out or samples, config, generator, objective).run()


class _Loop:
    """State of one tuning loop."""

    def __init__(
        self,
        block: nn.Module,
        weights: dict[str, Weight],
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
        free = [w for w in weights.values() if config.tune_range and w.format.rule.tunable]
        self._ranges = [(k, w.format.grid.end_steps) for w in free for k in (w.knobs.lo, w.knobs.hi)]
        self._rounding = [*self._offsets, *(k for k, _ in self._ranges)]
        self._trained = [*self._rounding, *self._others.values()]
        for p in self._trained:
            p.requires_grad_(True)
        self._order: list[int] = []

    def run(self) -> TunedBlock:
        config = self._config
        stepper = make_stepper(config, self._offsets, self._ranges, list(self._others.values()))
        best_loss = loss = initial = self._held_out_loss()
        best_step, done = 0, 0
        best = self._snapshot() if config.keep_best else None
        looks = set(held_out_looks(config))
        for step in range(config.iters):
            gradients = self._gradients(step)
            with torch.no_grad():
                stepper.step(gradients, step_factor(config, step))
                for knob, _ in self._ranges:
                    knob.clamp_(0.0, MAX_KNOB)
            done = step + 1
            if done not in looks:
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

    def _gradients(self, step: int) -> list[Tensor | None]:
        """Gradients of everything that is trained.

        The weights are rounded once, whatever passes through them: losses are differentiated up to the
        rounded weights, and the sum of those gradients goes through the rounding.
        """
        rounded = self._objective.rounding(self._weights)
        values = {n: w.detach().requires_grad_() for n, w in rounded.items()} | self._others
        reached = list(values.values())
        total: list[Tensor | None] = [None] * len(reached)
        half, scale = self._samples.inputs[0].dtype is torch.float16, None
        for _ in range(self._config.accumulate):
            batch, loss = self._next_batch(step), 0.0
            for part in self._parts(self._samples, batch):
                share = self._objective.loss(self._block, values, part)
                if not share.requires_grad:  # rows for which the model leaves the block out
                    continue
                if half and scale is None:
                    scale = _gradient_scale(share, part.counts)
                # A weight that the batch did not reach (an expert without tokens) has no gradient.
                found = torch.autograd.grad(share, reached, scale, allow_unused=True)
                total = [_add(a, b) for a, b in zip(total, found, strict=True)]
                loss += float(share.detach())
            self._check(loss)
        through = [(w, g.to(w.dtype)) for w, g in zip(rounded.values(), total, strict=False) if g is not None]
        inner: tuple[Tensor | None, ...] = (None,) * len(self._rounding)
        if through and self._rounding:
            outputs, gradients = zip(*through, strict=True)
            inner = torch.autograd.grad(outputs, self._rounding, gradients, allow_unused=True)
        all_found = [*inner, *total[len(rounded) :]]
        return all_found if scale is None else [None if g is None else g / scale for g in all_found]

    def _parts(self, samples: Samples, batch: Sequence[int]) -> Iterator[Batch]:
        """A batch cut into what goes through the block at once; their losses add up to that of the batch."""
        counts = samples.counts(batch, self._device)
        for index in samples.passes(batch, self._config.pass_rows):
            yield samples.batch(index, counts, self._device)

    def _next_batch(self, step: int) -> list[int]:
        size = min(batch_rows(self._config, step), len(self._samples))
        if len(self._order) < size:
            self._order = torch.randperm(len(self._samples), generator=self._generator, device="cpu").tolist()
        batch, self._order = self._order[:size], self._order[size:]
        return sorted(batch)

    def _held_out_loss(self) -> float:
        """Mean loss over all held-out samples with the parameters as they are."""
        total, size = 0.0, self._config.batch_size
        with torch.no_grad():
            values = fake_weights(self._weights) | self._others  # compiled code would be made anew for this
            for start in range(0, len(self._held_out), size):
                batch = range(start, min(start + size, len(self._held_out)))
                for part in self._parts(self._held_out, batch):
                    loss = self._objective.judge(self._block, values, part)
                    total += float(loss) * len(batch)
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


def _gradient_scale(loss: Tensor, counts: Sequence[Tensor]) -> Tensor:
    """Factor of the loss, and so of the gradients, while they pass through a block in float16.

    Positive numbers of float16 reach from 6e-8 to 65504, and gradients of a mean over millions of elements
    are smaller. With the factor they are about 1/64 at the block's output: sums over tokens still fit.
    """
    return reduce(torch.add, counts) * 2.0**-7 / loss.detach().sqrt().clamp_min(1e-9)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two gradients, kept in float32: many small ones would get lost in 16 bits."""
    if a is None or b is None:
        return b if a is None else a
    return a.add_(b) if a.dtype is torch.float32 else a.float().add_(b)


def _other_parameters(block: nn.Module, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Norm weights and biases (everything of one dimension) as float32 copies."""
    return {
        n: p.detach().float().clone()
        for n, p in block.named_parameters()
        if p.dim() == 1 and n not in weights
    }
