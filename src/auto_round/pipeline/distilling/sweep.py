"""One step over the whole model, with as few units of blocks in memory as need be: forward, then backward.

The forward sweep runs the original and the rounded blocks from one read of the weights, and keeps what flows
between units. The backward sweep reads each unit again, runs its rounded blocks on what flowed in, and pulls
the gradient of what flowed out back through them. The last units may stay in memory between the two, with all
that gradients need: they are read and run once, not twice. All that is learned moves by the gradient at one
and the same point: a unit moves when its own gradient, and that of what flows into it, are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auto_round.facts.flow import States
from auto_round.numerics.token_weights import token_energy, token_weights
from auto_round.pipeline.distilling.feed import StepRows
from auto_round.pipeline.distilling.shelf import LEARNED, MOMENTS
from auto_round.pipeline.distilling.units import OpenUnit, RowBatch, Units
from auto_round.pipeline.running.streams import Home, room_like
from auto_round.tuning.distill import DistillConfig, take_step
from auto_round.tuning.predictions import Ends, summed_divergence
from auto_round.tuning.student import ForwardPass, RoundedWeights


@dataclass(frozen=True, slots=True)
class Boundaries:
    """What flows between units, for the rows of a step.

    Attributes:
        original: what flows out of each original unit.
        rounded: what flows into each rounded unit, and out of the last.
    """

    original: list[States]
    rounded: list[States]

    @classmethod
    def like(cls, batch: StepRows, units: int, home: Home, spill: Path) -> Boundaries:
        """Room for them, to be used again at every step.

        Args:
            batch: rows of a step.
            units: how many units there are.
            home: where hidden states lie.
            spill: folder of files that back them, where `home` says so.
        """

        def room(name: str, count: int) -> list[States]:
            return [room_like(batch.reference, f"{name}-{n}", home, spill) for n in range(count)]

        return cls(room("original", units), room("rounded", units + 1))


_Flowed = tuple[list[int], tuple[Tensor | None, ...]]
"""Rows of a pass, and the gradient of what flowed in."""


@dataclass(slots=True)
class _Going:
    """A unit between its two sweeps.

    Attributes:
        here: the unit, open.
        rounded: its weights.
        passes: rows of each pass, and these rows as they went through.
        memory: frees the unit on closing.
    """

    here: OpenUnit
    rounded: RoundedWeights
    passes: Iterator[tuple[list[int], ForwardPass]]
    memory: ExitStack


@dataclass(frozen=True, slots=True)
class Sweep:
    """A step over the whole model.

    Attributes:
        units: of the model.
        ends: of the rounded and of the original model.
        config: settings.
        scales: what the squared error behind each unit is divided by: that before the first step.
        stay: how many of the last units stay in memory between their forward and their backward pass.
    """

    units: Units
    ends: Ends
    config: DistillConfig
    scales: Sequence[float]
    stay: int = 0

    def step(self, batch: StepRows, room: Boundaries, number: int) -> float:
        """Take step `number` (from 0) on some rows; returns their mean divergence before it, nats."""
        with ExitStack() as memory:
            return self._step(batch, room, number, memory)

    def _step(self, batch: StepRows, room: Boundaries, number: int, memory: ExitStack) -> float:
        staying = self.forward(batch, room, memory)
        rows = batch.rows
        counted = slice(None) if rows.masks is None else rows.masks.reshape(-1)
        out, target = room.rounded[-1][0], room.original[-1][0]
        width, device = out.shape[-1], self.units.job.device
        total, gradient = summed_divergence(
            out.reshape(-1, width)[counted].to(device),
            target.reshape(-1, width)[counted].to(device),
            self.ends,
            gradient=True,
        )
        count = rows.count * out.shape[1] if rows.masks is None else int(rows.masks.sum())
        whole = torch.zeros_like(out.reshape(-1, width), device=device)
        if gradient is not None:
            whole[counted] = gradient.div_(max(1, count))
        flowing: list[Tensor | None] = [whole.reshape(out.shape), *[None] * (len(room.rounded[-1]) - 1)]
        for unit in reversed(range(len(self.units.members))):
            wanted = self._with_features(flowing, room, rows, unit, count)
            going = staying.pop() if staying else self._enter(unit, rows, room.rounded[unit], memory)
            flowing = self._move(going, unit, room.rounded[unit], wanted, number)
        return float(total) / max(1, count)

    def forward(self, batch: StepRows, room: Boundaries, memory: ExitStack) -> list[_Going]:
        """Send rows through all units, original and rounded; `room` gets what flows between these.

        Args:
            batch: rows of a step.
            room: the boundaries.
            memory: frees what stays in memory, whatever happens.

        Returns:
            The units that stay in memory.
        """
        _copy(room.rounded[0], batch.quantized)
        reference, staying = batch.reference, []
        for number, (original, out) in enumerate(zip(room.original, room.rounded[1:], strict=True)):
            into = room.rounded[number]
            if number < len(room.original) - self.stay:
                self._forward(number, batch.rows, (reference, original), (into, out))
            else:
                staying.append(self._stay(number, batch.rows, (reference, original), (into, out), memory))
            reference = original
        return staying

    def _forward(
        self, unit: int, rows: RowBatch, original: tuple[States, States], rounded: tuple[States, States]
    ) -> None:
        """Run a unit from what flows in to what flows out; nothing of it is left when the next is opened."""
        with self.units.open(unit, rows) as here:
            here.run_original(*original)
            here.run_rounded(here.student.parameters(), *rounded)

    def _stay(
        self,
        unit: int,
        rows: RowBatch,
        original: tuple[States, States],
        rounded: tuple[States, States],
        memory: ExitStack,
    ) -> _Going:
        """The same of a unit that stays in memory with all that gradients need."""
        going = self._enter(unit, rows, rounded[0], memory)
        going.here.run_original(*original)
        passes = list(going.passes)
        for index, passed in passes:
            for to, state in zip(rounded[1], passed.outputs, strict=True):
                to[index] = state.detach().to(to.device)
        going.passes = iter(passes)
        return going

    def _enter(self, unit: int, rows: RowBatch, inputs: States, memory: ExitStack) -> _Going:
        """Open a unit and round its weights; rows go through when they are asked for."""
        own = memory.enter_context(ExitStack())
        here = own.enter_context(self.units.open(unit, rows))
        rounded = here.student.rounded()
        return _Going(here, rounded, self._passes(here, rounded, inputs), own)

    def _passes(
        self, here: OpenUnit, rounded: RoundedWeights, inputs: States
    ) -> Iterator[tuple[list[int], ForwardPass]]:
        device, samples = here.unit.device, here.samples(inputs)
        for some in samples.passes(range(here.rows.count), here.at_once):
            index = list(some)
            args, _ = samples.arguments(index)
            with here.rounding():
                passed = here.student.run(rounded, tuple(x[index].to(device) for x in inputs), args)
            yield index, passed

    def _with_features(
        self, flowing: Sequence[Tensor | None], room: Boundaries, rows: RowBatch, unit: int, count: int
    ) -> list[Tensor | None]:
        """The gradient of what a unit hands on, with that of its own squared error; means over positions."""
        share = self.config.features / len(self.units.members) / max(1, count)
        scale = self.scales[unit]
        if not share or not scale:
            return list(flowing)
        found: list[Tensor | None] = []
        outputs, targets = room.rounded[unit + 1], room.original[unit]
        hidden = self.units.flowing(unit)
        for i, (gradient, output, target) in enumerate(zip(flowing, outputs, targets, strict=True)):
            if i >= hidden:
                found.append(gradient)
                continue
            own = error_gradient(output, target, rows.mask_of(i)).mul_(share / scale)
            own = own.to(self.units.job.device)
            found.append(own if gradient is None else own.add_(gradient))
        return found

    def _move(
        self, going: _Going, unit: int, inputs: States, gradients: Sequence[Tensor | None], number: int
    ) -> list[Tensor | None]:
        """Move what is learned of a unit and free it; returns the gradient of what flowed in."""
        here, shelf, found = going.here, self.units.shelf, list[_Flowed]()
        student, device = here.student, here.unit.device
        for index, passed in going.passes:
            own = [None if g is None else g[index] for g in gradients]
            found.append((index, student.pull_back(going.rounded, passed, own)))
            del passed
        slopes = student.gradients(going.rounded)
        moments = {n: t.to(device) for n, t in shelf.load(unit, MOMENTS).items()}
        rates = student.rates(self.config)
        take_step(student.values, slopes, moments, rates, step=number, config=self.config)
        student.clamp()
        shelf.put(unit, LEARNED, student.values, number + 1)
        shelf.put(unit, MOMENTS, moments, number + 1)
        going.memory.close()
        return _joined(inputs, found, device)


def squared_error(output: Tensor, target: Tensor, mask: Tensor | None) -> float:
    """Mean over elements `[rows, length, width]` of the squared difference, weighted by `token_weights`."""
    weights = token_weights(token_energy(target), mask)
    error = (output.float() - target.float()).square().sum(-1)
    counted = max(1, int((weights > 0).sum())) * output.shape[-1]
    return float(torch.where(weights > 0, error * weights, 0.0).sum(dtype=torch.float64)) / counted


def error_gradient(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of `squared_error` in the output times the number of positions, float32."""
    weights = token_weights(token_energy(target), mask).unsqueeze(-1)
    difference = output.float() - target.float()
    return torch.where(weights > 0, difference * weights, 0.0).mul_(2.0 / output.shape[-1])


def _copy(to: States, states: States) -> None:
    for room, state in zip(to, states, strict=True):
        room.copy_(state)


def _joined(inputs: States, flowed: Sequence[_Flowed], device: torch.device) -> list[Tensor | None]:
    """Gradients of some rows each put together again, in the order of the rows."""
    found: list[Tensor | None] = []
    for position, state in enumerate(inputs):
        if all(part[position] is None for _, part in flowed):
            found.append(None)
            continue
        whole = torch.zeros(state.shape, dtype=state.dtype, device=device)
        for index, part in flowed:
            piece = part[position]
            if piece is not None:
                whole[index] = piece
        found.append(whole)
    return found
