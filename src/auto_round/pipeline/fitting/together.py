"""What a run holds while all blocks are tuned together."""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.evaluate.logits import positions_at_once
from auto_round.facts.layer import Layer
from auto_round.pipeline.fitting.parts import FLOAT, MemoryParts
from auto_round.pipeline.fitting.products import kept_products
from auto_round.pipeline.fitting.states import (
    MOMENT_BYTES,
    STATE_BYTES,
    flowing_bytes,
    states_in_memory,
    staying_units,
)
from auto_round.tuning.distill import DistillConfig, rows_of_step

STAY = "blocks that stay"
"""Part of the stage: units between their forward and their backward pass."""
EXPERTS_TOGETHER = 8
"""Bytes that products form for each weight of the largest parameter of fused experts in a step of all blocks
(measured, in both dtypes)."""
LOGITS_OF_STEP = 5
"""Logits of a step of all blocks: two models', their gradient, and what is formed of them."""


@dataclass(frozen=True, slots=True)
class Together(MemoryParts):
    """What tuning all blocks together holds."""

    def stay(self) -> list[int]:
        """What each of the last units holds that stay in memory between the two sweeps of a step, bytes."""
        sizes = [self._staying_unit(layers) for layers in self.groups()]
        count = staying_units(sizes, self.work.memory, self.work.device, self.level.streams)
        return sizes[len(sizes) - count :]

    def of_step(self, config: DistillConfig) -> dict[str, int]:
        """Where blocks are tuned: what is worked on, and the units that stay in memory."""
        work, facts, stay = self.work, self.work.source.facts, self.stay()
        in_memory = states_in_memory(config, work.quantized, work.memory)
        units = [self._unit(layers, in_memory) for layers in self.groups()]
        positions = min(positions_at_once(facts.vocabulary, self.logits_budget()), work.seqlen)
        logits = LOGITS_OF_STEP * positions * facts.vocabulary * work.dtype.itemsize
        there = [0] * (len(units) - len(stay)) + stay
        besides = (unit - size for unit, size in zip(units, there, strict=True))
        programs = max(kept_products(work, layers, self._at_once()) for layers in self.groups())
        return {
            "a block or logits": max(logits, *besides),
            STAY: sum(stay),
            "programs of products": 2 * programs,  # those of block tuning stay
        }

    def learned(self, config: DistillConfig) -> dict[str, int]:
        """What is learned of all blocks, and a unit's moments on their way to an accelerator: on the host."""
        work = self.work
        if config.codes_stay:
            return {"offsets and moments": 0}
        states = STATE_BYTES * work.quantized if states_in_memory(config, work.quantized, work.memory) else 0
        units = (sum(a.weights for a in layers if a.name in work.formats) for layers in self.groups())
        moved = 0 if work.device.type == "cpu" else MOMENT_BYTES * max(units)
        return {"offsets and moments": states, "moments of a block": moved}

    def between(self, config: DistillConfig) -> dict[str, int]:
        """What flows between blocks: where hidden states lie."""
        work, units = self.work, sum(1 for _ in self.groups())
        row = self.sizes.stream // max(1, work.rows)
        return {"between blocks": flowing_bytes(units, row, work.seqlen, work.held_out, config.steps)}

    def _at_once(self) -> int:
        """Rows that go through a unit at once."""
        return min(rows_of_step(self.work.seqlen), self.level.rows or self.work.tune.batch_size)

    def _staying_unit(self, layers: list[Layer]) -> int:
        """A group of blocks between its forward and its backward pass."""
        quantized = [layer for layer in layers if layer.name in self.work.formats]
        tuned = sum(layer.weights for layer in quantized)
        rounded = tuned * self.work.dtype.itemsize + sum(map(self.kept, quantized))
        kept = self.kept_activations(layers, rows_of_step(self.work.seqlen))
        return self._weights(layers, tuned) + self.ranges(quantized) + rounded + kept

    def _unit(self, layers: list[Layer], in_memory: bool) -> int:
        """A group of blocks while gradients are formed."""
        work, itemsize = self.work, self.work.dtype.itemsize
        quantized = [layer for layer in layers if layer.name in work.formats]
        tuned = sum(layer.weights for layer in quantized)
        states = 0 if in_memory and work.device.type == "cpu" else STATE_BYTES * tuned
        rounded = tuned * 2 * itemsize + sum(map(self.kept, quantized))
        experts = {a.parameter for a in quantized if a.expert is not None}
        stacks = (sum(n for (p, _), n in self.parameters.items() if p == parameter) for parameter in experts)
        products = max(stacks, default=0) * EXPERTS_TOGETHER
        through = max(self.activations(layers, self._at_once()) + products, tuned * FLOAT)
        return self._weights(layers, tuned) + states + self.ranges(quantized) + rounded + through

    def _weights(self, layers: list[Layer], tuned: int) -> int:
        """Weights as blocks run with them, and those to be rounded as the model has them."""
        own, itemsize = self.work.source.dtype.itemsize, self.work.dtype.itemsize
        count = sum(layer.weights for layer in layers)
        return count * itemsize + (tuned * own if own != itemsize else 0)
