"""SignRound: learn how each weight of a block is rounded, against the block's own output.

Notation of arXiv 2309.05516: V are rounding offsets in units of the step, the knobs are its alpha and beta.
The block is called with substituted weights (`torch.func.functional_call`); nothing is attached to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from auto_round.errors import ConfigError, NumericsError
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.rule import Effort
from auto_round.numerics.scale import MAX_KNOB, Knobs
from auto_round.numerics.search import QUICK, THOROUGH
from auto_round.ranks.ranks import Ranks, done_together, own_rows
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.gradients import GradientSum
from auto_round.tuning.objective import PLAIN, Objective
from auto_round.tuning.samples import Counts, Samples
from auto_round.tuning.stacks import find_stacks
from auto_round.tuning.steps import Stepper, batch_rows, held_out_looks, make_stepper, sign_move, step_factor
from auto_round.tuning.weights import Learned, Weight, WeightTask, fake_weights


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """Result of tuning one block.

    Attributes:
        weights: quantized parameters by dotted name.
        others: retrained norm weights and biases by dotted name, in the parameter's dtype.
        initial_loss: held-out loss of the starting point.
        loss: held-out loss of what is returned.
        best_step: step that was kept; 0 is the starting point, or its ranges with codes whose errors cancel
            (`numerics.descent`), if those have the smallest loss of all.
        learned: offsets and knobs of each weight, where the settings keep them.
    """

    weights: Mapping[str, QTensor]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    initial_loss: float = math.nan
    loss: float = math.nan
    best_step: int = 0
    learned: Mapping[str, Learned] = field(default_factory=dict)


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
    ranks, sizes = objective.ranks, {name: _numel(block, name) for name in tasks}
    if not config.iters or not tasks:
        if config.keeps_offsets:
            weights = {name: Weight.of(block, name, task, effort) for name, task in tasks.items()}
            learned = {n: w.learned() for n, w in weights.items()}
            return TunedBlock({n: w.quantize() for n, w in weights.items()}, learned=learned)
        return TunedBlock(
            done_together(ranks, sizes, lambda name: Weight.of(block, name, tasks[name], effort).quantize())
        )
    weights = _starting_points(block, tasks, effort, ranks)
    if not len(samples):
        raise ConfigError("no samples to tune on: give some, or iters=0 to round without tuning")
    # In one thread gradients are added in the order of the forward pass, whichever devices they come from.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        return _Loop(block, weights, samples, held_out or samples, config, generator, objective).run()


def _starting_points(
    block: nn.Module, tasks: Mapping[str, WeightTask], effort: Effort | None, ranks: Ranks
) -> dict[str, Weight]:
    """The weights before the first step; each is searched by one of the ranks."""
    if effort is None or ranks.size == 1:
        return {name: Weight.of(block, name, task, effort) for name, task in tasks.items()}

    def searched(name: str) -> tuple[Knobs, Tensor | None]:
        weight = Weight.of(block, name, tasks[name], effort)
        return weight.knobs, weight.v if bool(weight.v.any()) else None

    found = done_together(ranks, {name: _numel(block, name) for name in tasks}, searched)
    weights = {name: Weight.of(block, name, task, None) for name, task in tasks.items()}
    for name, (knobs, offsets) in found.items():
        here = weights[name].original.device  # what others found comes to the main device
        weights[name].knobs = Knobs(knobs.lo.to(here), knobs.hi.to(here))
        if offsets is not None:
            weights[name].v = offsets.to(here)
    return weights


def _numel(block: nn.Module, name: str) -> int:
    return block.get_parameter(name).numel()


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
        apart = samples.inputs[0].dtype is not torch.float16 and objective.matrix_by_matrix
        alone = objective.ranks.size == 1 and not config.by_row
        self._stacks = find_stacks(block, weights) if apart and alone else {}
        self._plain = {n: w for n, w in weights.items() if n not in self._stacks}
        self._samples, self._held_out, self._generator = samples, held_out, generator
        self._device = objective.device or next(iter(weights.values())).original.device
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
        began = [p.detach().clone() for p in self._trained[len(self._offsets) :]]
        kept = self._kept_whole()
        best = [p.detach().clone() for p in kept] if config.keep_best else []
        codes = self._codes() if config.keep_best else {}
        looks = set(held_out_looks(config))
        for step in range(config.iters):
            self._take(stepper, step)
            done = step + 1
            if done not in looks:
                continue
            loss = self._held_out_loss()
            if loss < best_loss:
                best_loss, best_step = loss, done
                _copy(kept, best)
                if config.keep_best:
                    codes = {}  # their memory is free for what comes
                    codes = self._codes()
            elif config.patience and done - best_step >= config.patience:
                break
        if config.keep_best:
            _copy(best, kept)
            loss, done = best_loss, best_step
            cancelled = self._cancelled_loss(began)
            if cancelled < loss:
                loss, done, codes = cancelled, 0, {}
            else:
                _copy(best, kept)
            best.clear()
        return TunedBlock(
            {n: codes[n] if n in codes else w.quantize() for n, w in self._weights.items()},
            {n: p.detach().to(self._block.get_parameter(n).dtype) for n, p in self._others.items()},
            initial,
            loss,
            done,
            {n: w.learned() for n, w in self._weights.items()} if config.keeps_offsets else {},
        )

    def _kept_whole(self) -> list[Tensor]:
        """What is trained, without offsets and ranges of stacks of which codes are all that is wanted."""
        if self._config.keeps_offsets:
            return self._trained
        stacks = [each.weight for each in self._stacks.values()]
        left_out = {id(p) for w in stacks for p in (w.v, w.knobs.lo, w.knobs.hi)}
        return [p for p in self._trained if id(p) not in left_out]

    def _codes(self) -> dict[str, QTensor]:
        """Codes of the stacks as they are now: a quarter of what their offsets would take."""
        if self._config.keeps_offsets:
            return {}
        return {name: each.weight.quantize() for name, each in self._stacks.items()}

    def _take(self, stepper: Stepper, step: int) -> None:
        """One step; its gradients are freed before the next ones are computed."""
        gradients = self._gradients(step)
        with torch.no_grad():
            stepper.step(gradients, step_factor(self._config, step))
            for knob, _ in self._ranges:
                knob.clamp_(0.0, MAX_KNOB)

    def _gradients(self, step: int) -> list[Tensor | None]:
        """Gradients of everything that is trained.

        The weights are rounded once, whatever passes through them: losses are differentiated up to the
        rounded weights, and the sum of those gradients goes through the rounding.
        """
        with torch.set_grad_enabled(not self._objective.rounds_again):
            rounded = self._objective.rounding(self._plain)
        values = {n: w.detach().requires_grad_() for n, w in rounded.items()} | self._others
        total, scale = self._behind_rounding(values, step)
        if self._objective.rounds_again:
            values.clear()
            rounded.clear()
            inner = self._through_rounding_again(total)
        else:
            inner = list(self._through_rounding(list(rounded.values()), total))
        if self._stacks:
            inner = self._with_stacks(inner)
        all_found = [*inner, *total[len(self._plain) :]]
        return (
            all_found if scale is None else [None if g is None else g / scale.to(g.device) for g in all_found]
        )

    def _behind_rounding(
        self, values: Mapping[str, Tensor], step: int
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gradients of the loss by rounded weights and other parameters, and what they were multiplied by."""
        reached = [*values.values(), *(stack.anchor for stack in self._stacks.values())]
        everything = {**values, **{name: stack.round() for name, stack in self._stacks.items()}}
        ranks, half = self._objective.ranks, self._samples.inputs[0].dtype is torch.float16
        found, first = GradientSum(ranks, by_row=self._config.by_row, half=half), 0
        for _ in range(self._config.accumulate):
            passes, loss = self._passes(self._samples, self._next_batch(step)), 0.0
            alone = self._config.accumulate == 1 and len(passes) == 1
            for stack in self._stacks.values():
                stack.begin(sign_move(self._config, step), alone=alone)
            for place in own_rows(ranks, range(len(passes))):
                part = self._samples.batch(*passes[place], self._device)
                share = self._objective.loss(self._block, everything, part)
                if share.requires_grad:  # not for rows for which the model leaves the block out
                    found.add(first + place, share, reached, part.counts)
                    loss += float(share.detach())
            first += len(passes)
            self._check(loss)
        total, scale = found.total(len(reached))
        return list(total)[: len(values)], scale

    def _through_rounding(
        self, rounded: Sequence[Tensor], behind: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of offsets and range multipliers from those of the rounded weights."""
        through = [(w, g.to(w)) for w, g in zip(rounded, behind, strict=False) if g is not None]
        if not (through and self._rounding):
            return (None,) * len(self._rounding)
        outputs, gradients = zip(*through, strict=True)
        return torch.autograd.grad(outputs, self._rounding, gradients, allow_unused=True)

    def _through_rounding_again(self, behind: list[Tensor | None]) -> list[Tensor | None]:
        """The same, weight by weight: each is rounded once more, and nothing was kept of the first time."""
        found: dict[int, Tensor | None] = {}
        places = {id(p) for p in self._rounding}
        for i, weight in enumerate(self._plain.values()):
            gradient, behind[i] = behind[i], None
            own = [p for p in (weight.v, weight.knobs.lo, weight.knobs.hi) if id(p) in places]
            if gradient is None or not own:
                continue
            rounded = weight.fake()
            inner = torch.autograd.grad(rounded, own, gradient.to(rounded), allow_unused=True)
            found.update(zip(map(id, own), inner, strict=True))
        return [found.get(id(p)) for p in self._rounding]

    def _with_stacks(self, inner: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of offsets and range multipliers, those of stacks filled in."""
        found: dict[int, Tensor | None] = {}
        for stack in self._stacks.values():
            weight = stack.weight
            own = map(id, (weight.v, weight.knobs.lo, weight.knobs.hi))
            found.update(zip(own, stack.gradients(), strict=True))
        return [found.get(id(p), g) for p, g in zip(self._rounding, inner, strict=True)]

    def _passes(self, samples: Samples, batch: Sequence[int]) -> list[tuple[Sequence[int], Counts]]:
        """A batch cut into what goes through the block at once; their losses add up to that of the batch."""
        counts = samples.counts(batch, self._device)
        at_once = self._config.pass_rows
        if (size := self._objective.ranks.size) > 1:
            at_once = min(at_once, -(-len(batch) // size))  # so that each rank has some
        return [(index, counts) for index in samples.passes(batch, at_once)]

    def _next_batch(self, step: int) -> list[int]:
        size = min(batch_rows(self._config, step), len(self._samples))
        if len(self._order) < size:
            self._order = torch.randperm(len(self._samples), generator=self._generator, device="cpu").tolist()
        batch, self._order = self._order[:size], self._order[size:]
        return sorted(batch)

    def _held_out_loss(self) -> float:
        """Mean loss over all held-out samples with the parameters as they are."""
        ranks, size, held_out = self._objective.ranks, self._config.batch_size, self._held_out
        batches = [range(n, min(n + size, len(held_out))) for n in range(0, len(held_out), size)]
        parts = [(part, len(batch)) for batch in batches for part in self._passes(held_out, batch)]
        own: list[float] = []
        with torch.no_grad():
            values = fake_weights(self._plain) | self._others  # compiled code would be made anew for this
            everything = values | {name: stack.round() for name, stack in self._stacks.items()}
            for place in own_rows(ranks, range(len(parts))):
                (index, counts), rows = parts[place]
                part = held_out.batch(index, counts, self._device)
                own.append(float(self._objective.judge(self._block, everything, part)) * rows)
        total = 0.0
        for loss in chain.from_iterable(ranks.objects(own)):  # in the parts' order, whoever made them
            total += loss
        return self._check(total / max(1, len(self._held_out)))

    def _cancelled_loss(self, began: Sequence[Tensor]) -> float:
        """Held-out loss of the start with codes whose errors cancel; the parameters are left like that.

        In short runs at 4 bits and more it can be smaller than all that steps find. They do not begin there:
        at 2 bits a model ends worse than from nearest numbers, at 4 bits alike (docs/LOG.md).

        Args:
            began: everything that is trained beside the offsets, as it was at first.

        Returns:
            Infinity where they are not to be tried, offsets are not tuned, or no products are known.
        """
        if not (self._config.try_cancelled and self._config.search and self._offsets):
            return math.inf
        with torch.no_grad():
            for p, value in zip(self._trained[len(self._offsets) :], began, strict=True):
                p.copy_(value)
        weights = self._weights
        sizes = {name: w.v.numel() for name, w in self._plain.items()}
        found = done_together(
            self._objective.ranks, sizes, lambda name: weights[name].cancelled(THOROUGH.sweeps)
        )
        known = [v is not None for v in found.values()]
        with torch.no_grad():
            for stack in self._stacks.values():
                known.append(stack.weight.cancel(THOROUGH.sweeps))
            if not any(known):
                return math.inf
            for name, v in found.items():
                if v is None:
                    weights[name].v.zero_()
                else:
                    weights[name].v.copy_(v)
        return self._held_out_loss()

    def _check(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise NumericsError(
                f"the block's loss became {loss}: its inputs or outputs overflow; "
                "try a wider model dtype (--model_dtype fp32 or bf16)"
            )
        return loss


def _copy(values: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    """Copy values to where they are kept, nowhere where there are no places: nothing is held a third time."""
    with torch.no_grad():
        for place, value in zip(places, values, strict=False):
            place.copy_(value)


def _other_parameters(block: nn.Module, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Norm weights and biases (everything of one dimension) as float32 copies."""
    return {
        n: p.detach().float().clone()
        for n, p in block.named_parameters()
        if p.dim() == 1 and n not in weights
    }
