"""Blocks of encoders for images and sound: quantized first, so that language blocks see what they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from auto_round.calibration.observe import InputMoments, observe_inputs
from auto_round.errors import UnsupportedError
from auto_round.facts.inputs import WEIGHT
from auto_round.facts.layer import Layer, Role
from auto_round.log import logger
from auto_round.models.families import flow_of
from auto_round.models.source import Stem
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.pipeline.deciding.activations import formats_inside
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.kept_dtype import as_wanted
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.block_group import BlockGroup
from auto_round.pipeline.running.rounding import round_matrix
from auto_round.pipeline.running.streams import Streams
from auto_round.pipeline.running.tower_runs import (
    TowerRun,
    masks_of_runs,
    refuse_other_lengths,
    table_of,
    watch_runs,
)
from auto_round.pipeline.running.unit import Unit, tune_unit

Chosen = Mapping[str, tuple[Layer, Format]]
"""Name -> layer of an encoder, and what it is rounded to."""
Write = Callable[[Layer, QuantizedLayer], None]
SEEDS_OF_TOWERS = 1_000_000
"""Added to the seed, so that no list of blocks draws its rows as another does."""


def quantize_towers(job: Job, write: Write) -> dict[str, Tensor]:
    """Quantize the matrices of encoders that the plan quantizes: tuned block by block with the rows' images.

    Each list of blocks is tuned as language blocks are, image after image: patches of several images may lie
    in one tensor, whose borders are among the blocks' arguments. Encoders that cannot be run block by block,
    or that no row reaches, are rounded in ranges that are searched with what flows into them.

    Args:
        job: the run.
        write: keeps a finished layer.

    Returns:
        Parameter of the model -> its rounded weight `[out, in]` in the dtype that blocks run in.

    Raises:
        NumericsError: a weight is not finite.
    """
    chosen = {n: pair for n, pair in job.quantized().items() if pair[0].role is Role.TOWER}
    if not chosen:
        return {}
    with job.source.stem(dtype=job.dtype, head=False, towers=True) as stem:
        rounded: dict[str, Tensor] = {}
        for path in _lists(stem.model, chosen):
            inside = {n: pair for n, pair in chosen.items() if pair[0].parameter.startswith(f"{path}.")}
            rounded |= _quantize_list(job, stem, path, inside, write)
    return rounded


def _lists(model: nn.Module, chosen: Chosen) -> list[str]:
    """Module paths of the lists of blocks that hold the layers, those nearest to the layers."""
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: dict[str, None] = {}
    for layer, _ in chosen.values():
        around = [path for path in lists if layer.parameter.startswith(f"{path}.")]
        found[min(around, key=len)] = None
    return list(found)


def _quantize_list(job: Job, stem: Stem, path: str, chosen: Chosen, write: Write) -> dict[str, Tensor]:
    """One list of blocks: tuned, or rounded where that cannot be."""
    blocks = [module for _, module in stem.model.get_submodule(path).named_children()]
    if not job.tune.iters:
        return _round(job, stem, chosen, write)
    try:
        runs, tuned = _watched(job, stem, blocks)
    except UnsupportedError as error:
        why = "; ".join(refusal.reason for refusal in error.refusals) or str(error)
        logger.warning("%s is rounded in searched ranges, not tuned: %s", path, why)
        return _round(job, stem, chosen, write)
    return _Tuning(job, path, blocks, chosen, runs, tuned).run(write)


def _watched(job: Job, stem: Stem, blocks: Sequence[nn.Module]) -> tuple[list[TowerRun], int]:
    """Runs of all rows with images, those that are tuned on first, and how many these are.

    Raises:
        UnsupportedError: the blocks cannot be run one by one, or no row reaches them.
    """
    rows = job.all_rows
    counts = []
    with watch_runs(blocks, [flow_of(block) for block in blocks]) as runs:
        for row in rows:
            if row.beside_text:
                stem.trace(row.inputs)
            counts.append(len(runs))
    refuse_other_lengths(runs, len(blocks))
    tuned = counts[job.tuned - 1]
    if not tuned:
        raise UnsupportedError("no row that is tuned on reaches it")
    return runs, tuned


@dataclass(frozen=True, slots=True)
class _Tuning:
    """One list of blocks of an encoder, and what it is tuned on."""

    job: Job
    path: str
    blocks: Sequence[nn.Module]
    chosen: Chosen
    runs: Sequence[TowerRun]
    tuned: int

    def run(self, write: Write) -> dict[str, Tensor]:
        """Tune block after block; returns the rounded weights by parameter."""
        job, runs = self.job, self.runs
        longest = max(run.length for run in runs)
        states = [run.state(longest, job.dtype) for run in runs]
        streams = Streams.begin(states, self.tuned, device=torch.device("cpu"), masks=masks_of_runs(runs))
        # Norms and biases of encoders are written as they are.
        config = replace(job.tune, tune_norm_bias=False)
        table, found = table_of(runs), dict[str, Tensor]()
        for index, block in enumerate(self.blocks):
            layers = self._layers(index)
            result = tune_unit(
                self._unit(index, block.to(job.device), layers, table),
                streams,
                config,
                generator=torch.Generator().manual_seed(self._seed + index),
                from_quantized=job.options.tune.enable_quanted_input,
            )
            block.to("cpu")
            losses = (result.tuned.initial_loss, result.tuned.loss)
            logger.info("%s.%d: loss %.3g, then %.3g", self.path, index, *losses)
            for name, (layer, _) in layers.items():
                write(layer, QuantizedLayer(result.tuned.weights[name]))
                found[layer.parameter] = result.parameters[name].cpu()
        return found

    @property
    def _seed(self) -> int:
        """Of the order of the runs, another one for each list."""
        return self.job.options.calibration.seed + SEEDS_OF_TOWERS + 1000 * len(self.path)

    def _layers(self, index: int) -> dict[str, tuple[Layer, Format]]:
        """Parameter inside the unit -> layer of one block."""
        inside = f"{self.path}.{index}."
        pairs = [pair for pair in self.chosen.values() if pair[0].parameter.startswith(inside)]
        return {f"0.{pair[0].parameter.removeprefix(inside)}": pair for pair in pairs}

    def _unit(
        self, index: int, block: nn.Module, layers: Mapping[str, tuple[Layer, Format]], table: ArgumentTable
    ) -> Unit:
        job = self.job
        weights = {n: as_wanted(job.source.read(layer), job.kept_dtype) for n, (layer, _) in layers.items()}
        return Unit(
            group=BlockGroup([block], [flow_of(block)]),
            originals={name: weight.to(job.device) for name, weight in weights.items()},
            formats={name: fmt for name, (_, fmt) in layers.items()},
            activations=formats_inside(job.plan, job.source.layers, {"0": f"{self.path}.{index}"}),
            observed=[name.removesuffix(WEIGHT) for name in layers] if job.tune.search else [],
            table=table,
            blocks=[index],
            device=job.device,
            percentile=job.options.calibration.act_percentile,
        )


def _round(job: Job, stem: Stem, chosen: Chosen, write: Write) -> dict[str, Tensor]:
    """Round matrices in ranges searched with the importance of their inputs, as those of the head are."""
    moments = _moments(job, stem, [layer for layer, _ in chosen.values()]) if job.tune.search else {}
    rounded = {}
    for layer, fmt in chosen.values():
        seen = moments.get(layer.parameter.removesuffix(WEIGHT))
        importance = None if seen is None else seen.importance()
        weight = as_wanted(job.source.read(layer), job.kept_dtype)
        q = round_matrix(layer.tensor, weight, fmt, job.device, importance, job.effort)
        write(layer, QuantizedLayer(q))
        rounded[layer.parameter] = q.format.dequantize(q, job.dtype).cpu()
    return rounded


def _moments(job: Job, stem: Stem, layers: Sequence[Layer]) -> Mapping[str, InputMoments]:
    """Module -> second moments of its inputs in the rows that are tuned on."""
    rows = job.all_rows[: job.tuned]
    names = [layer.parameter.removesuffix(WEIGHT) for layer in layers]
    with observe_inputs(stem.model, names) as seen:
        for row in rows:
            if row.beside_text:
                stem.trace(row.inputs)
    return seen
