"""Channels of inputs are evened out before anything is rounded; see `numerics.smoothing`.

The unquantized model is run over a few rows, block by block. In each block the channels that can be rescaled
are found (`models.links`), and how large they are. From then on the run sees the rescaled model: the same
function, of which norms and matrices are read with their factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from auto_round.calibration.row import CalibrationRow
from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.errors import InternalError
from auto_round.facts.layer import Block, Layer, Role
from auto_round.log import ProgressSink, logger
from auto_round.models.links import VECTOR, Link, find_links
from auto_round.models.source import name_on_disk
from auto_round.numerics.smoothing import Rescaling, channel_factors, held_factors
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.smoothing import (
    RESCALED,
    Smoothing,
    gains,
    is_whole,
    rounds_inputs,
    strength_of,
)
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.machine.memory import release_freed_memory
from auto_round.pipeline.running.original import OriginalBlock, original_blocks
from auto_round.pipeline.running.rounding import round_matrix

TOKENS, LENGTH = 1024, 64
"""Tokens over which channels are measured, as whole rows allow, and of how many tokens rows of text are:
finding links runs a block a dozen times on one row. With sixteen times as many tokens factors differ by 3 %
(docs/LOG.md)."""
EXPERTS_TOKENS, EXPERTS_LENGTH = 2048, 256
"""The same where there are experts: a row has to reach those that a link counts on."""
SAMPLED = 16
"""Rows of a matrix that tell whether its weights lie on a grid already."""
ON_GRID = 1e-3
"""Squared error of rounding beside squared weights below which they do: rounding to 4 bits leaves 6e-3, to 3
bits more, and bfloat16, in which unpacked weights are held, 1e-6."""
_DIVIDED, _MULTIPLIED, _PLUS = "divided", "multiplied", "plus"


def find_changes(job: Job, scratch: Path, progress: ProgressSink, clock: Clock) -> dict[str, Rescaling]:
    """Tensor on disk -> what becomes of it, where the user or the scheme asks for it; empty elsewhere.

    They are kept in `scratch`: a run that is continued goes on with the same ones.

    Args:
        job: the run, with all of its rows.
        scratch: folder of the run.
        progress: receives an event a block.
        clock: of the run.
    """
    strength = strength_of(job)
    if not strength:
        return {}
    kept = scratch / "smoothing.safetensors"
    if not kept.exists():
        clock.lap("prepare")
        save_tensors(kept, _to_tensors(_find(job, strength, scratch, progress, clock)))
        clock.lap("smooth")
    return _from_tensors(load_tensors(kept))


def with_changes(job: Job, changes: Mapping[str, Rescaling]) -> Job:
    """The run on a rescaled model.

    Args:
        job: the run.
        changes: tensor on disk -> what becomes of it.
    """
    if not isinstance(job.source, RESCALED):
        raise InternalError("this model cannot be rescaled")
    told = Smoothing.of(strength_of(job), changes)
    logger.info("%s", told.sentence)
    return replace(job, source=job.source.rescaled(changes), smoothing=told)


def _to_tensors(changes: Mapping[str, Rescaling]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, change in changes.items():
        plus = torch.tensor([change.plus], dtype=torch.float32, device="cpu")
        parts = {_DIVIDED: change.divided, _MULTIPLIED: change.multiplied, _PLUS: plus}
        found |= {f"{name}|{part}": value for part, value in parts.items() if value is not None}
    return found


def _from_tensors(saved: Mapping[str, Tensor]) -> dict[str, Rescaling]:
    names = dict.fromkeys(name.rpartition("|")[0] for name in saved)
    return {
        name: Rescaling(
            saved.get(f"{name}|{_DIVIDED}"),
            saved.get(f"{name}|{_MULTIPLIED}"),
            float(saved[f"{name}|{_PLUS}"]),
        )
        for name in names
    }


def _find(
    job: Job, strength: float, scratch: Path, progress: ProgressSink, clock: Clock
) -> dict[str, Rescaling]:
    """Tensor on disk -> what becomes of it, over all blocks."""
    probe = replace(job.on_rows(_few(job)), dtype=torch.float32)
    found: list[dict[str, Rescaling]] = []
    elsewhere: set[str] = set()
    for here in original_blocks(probe, scratch):
        names = _Names(job, here.block)
        elsewhere |= {names.of(n) for n, _ in here.module.named_parameters()} - names.own
        for changes in _of_block(here, names, strength):
            found.append({names.of(name): change for name, change in changes.items()})
        progress(clock.event("smooth", here.block.index + 1, len(job.source.blocks), here.block.disk))
    release_freed_memory()  # holes that float32 leaves do not fit what comes
    return _joined(found, elsewhere)


def _few(job: Job) -> Sequence[CalibrationRow]:
    """The first rows, of text the beginnings of them, with so many tokens as are to be looked at."""
    routed = any(layer.role is Role.EXPERT for layer in job.source.layers)
    tokens, length = (EXPERTS_TOKENS, EXPERTS_LENGTH) if routed else (TOKENS, LENGTH)
    rows: Sequence[CalibrationRow] = job.all_rows[: job.tuned]
    cut = [row.beginning(max(length, -(-tokens // len(rows)))) for row in rows]
    if all(short.positions and not row.beside_text for row, short in zip(rows, cut, strict=True)):
        rows = cut
    return rows[: max(2, -(-tokens // max(1, len(rows[0]))))]


def _joined(found: list[dict[str, Rescaling]], elsewhere: set[str]) -> dict[str, Rescaling]:
    """The changes of all links but of those that rescale what another block reads too."""
    changes: dict[str, Rescaling] = {}
    for link in found:
        if not elsewhere & link.keys():
            for name, change in link.items():
                changes[name] = changes.get(name, Rescaling()).also(change)
    return changes


class _Names:
    """Where the parameters of a block lie on disk."""

    def __init__(self, job: Job, block: Block) -> None:
        self._source, self._block, self._job = job.source, block, job
        layers = [layer for layer in job.source.layers if layer.block == block.index]
        self._matrices = {layer.parameter for layer in layers if is_whole(layer)}
        self._asked = job.options.tune.smooth is not None
        self._gaining = {
            layer.parameter: layer for layer in layers if self._asked or gains(job.plan, layer.name)
        }
        self._inputs = {layer.parameter for layer in layers if rounds_inputs(job.plan, layer.name)}
        self.own = {n for n in job.source.tensors if n.startswith(f"{block.disk}.")} | {""}

    def of(self, parameter: str) -> str:
        """Name of the tensor that is a parameter of the block; empty where it is made of several."""
        return name_on_disk(self._source, f"{self._block.module}.{parameter}")

    def usable(self, link: Link, block: nn.Module) -> bool:
        """Whether all parameters of a link can be rescaled, and one that reads it gains by it.

        Where the user asked for smoothing, every link counts; else not those of matrices that gain nothing.
        """
        names = (*link.makers, *link.readers)
        gained = any(f"{self._block.module}.{name}" in self._gaining for name in link.readers)
        return gained and all(self._plain(name, block.get_parameter(name)) for name in names)

    def inputs_rounded(self, link: Link) -> bool:
        """Whether one that reads a link rounds its inputs, too."""
        return any(f"{self._block.module}.{name}" in self._inputs for name in link.readers)

    def rounded_already(self, link: Link, block: nn.Module) -> bool:
        """Whether weights that read a link, and they alone are rounded, lie on the grid that they go to.

        So they do where a model was trained for it, or rounded before, and is stored in plain numbers:
        rounded as they are they lose nothing, rescaled as much as all others.
        """
        if self._asked or self.inputs_rounded(link):
            return False
        found = ((self._gaining.get(f"{self._block.module}.{name}"), name) for name in link.readers)
        return any(self._on_grid(layer, block.get_parameter(name)) for layer, name in found if layer)

    def _on_grid(self, layer: Layer, weight: Tensor) -> bool:
        fmt = self._job.plan.format_of(layer.name)
        if fmt is None:
            return False
        rows = weight.detach()[:: max(1, weight.shape[0] // SAMPLED)][:SAMPLED].float()
        stored = round_matrix(layer.name, rows, fmt, weight.device, effort=self._job.effort)
        off = (fmt.dequantize(stored) - rows).square().sum()
        return bool(off < ON_GRID * rows.square().sum())

    def dtypes(self, parameter: str) -> tuple[torch.dtype, torch.dtype]:
        """Dtype of the tensor on disk, and that in which outputs keep it: it is rounded to both, in turn."""
        name = self.of(parameter)
        return self._source.tensors[name].dtype, self._source.kept[name].dtype

    def read(self, parameter: str) -> Tensor:
        """A parameter as it lies on disk: the block has it in the dtype in which the run computes."""
        return self._source.read_tensor(self.of(parameter))

    def holds(self, change: Rescaling, parameter: str, value: Tensor) -> bool:
        """Whether all numbers of a parameter can still be stored: those of float16 end at 65,504."""
        own, kept = self.dtypes(parameter)
        return bool(change.of(value.to(own)).to(kept).isfinite().all())

    def _plain(self, parameter: str, value: Tensor) -> bool:
        """Whether the tensor on disk is that parameter, axis by axis."""
        name = self.of(parameter)
        if name not in self.own or not name:
            return False
        plain = value.dim() == VECTOR or f"{self._block.module}.{parameter}" in self._matrices
        return plain and tuple(self._source.tensors[name].shape) == tuple(value.shape)


def _of_block(here: OriginalBlock, names: _Names, strength: float) -> Iterator[dict[str, Rescaling]]:
    """For each link of a block what becomes of its parameters; runs all rows."""
    block, streams = here.module, here.streams

    def added() -> tuple[Tensor, ...]:
        here.run(range(1))
        beside = (state[0] for state in streams.targets[1:] if state.is_floating_point())
        hidden = (streams.targets[0][0] - streams.reference[0][0]).float()
        return (hidden, *(state.to(torch.float32, copy=True) for state in beside))

    def usable(link: Link) -> bool:
        return names.usable(link, block)

    skipped = here.table.skipped(here.number)
    links = [] if skipped else find_links(block, added, usable)
    readers = dict.fromkeys(link.readers[0].removesuffix(".weight") for link in links)
    with _squares(block, readers, here.masks) as squares:
        here.run(range(streams.rows))
    for link in links:
        if names.rounded_already(link, block):
            continue
        inputs = squares[link.readers[0].removesuffix(".weight")]
        columns = link.gathered(_columns(block, link)) if names.inputs_rounded(link) else None
        factors = channel_factors(link.gathered(inputs), columns, strength)
        for name, plus in link.makers.items():
            if block.get_parameter(name).dim() == VECTOR and name.endswith(".weight"):
                stored = names.read(name).to(factors.device)
                for dtype in names.dtypes(name):
                    factors = held_factors(factors, stored, dtype, plus)
        changes = link.changes(factors.cpu())
        if all(names.holds(change, name, block.get_parameter(name)) for name, change in changes.items()):
            yield changes


def _columns(block: nn.Module, link: Link) -> Tensor:
    """Mean squares of the columns that read a link, `[channels]`, over all of its readers."""
    return torch.stack([block.get_parameter(n).float().square().mean(0) for n in link.readers]).mean(0)


@contextmanager
def _squares(
    block: nn.Module, layers: Mapping[str, None], masks: Tensor | None
) -> Iterator[dict[str, Tensor]]:
    """Mean squares of input channels, every token scaled to mean square 1: massive ones count like others."""
    found: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, row = args[0].detach().float(), count.get(name, 0)
            count[name] = row + 1
            if masks is not None and masks[row].shape == x.shape[1:-1]:
                x = x[:, masks[row].to(x.device)]
            energy = x.square().reshape(-1, x.shape[-1])
            mean = energy.mean(-1, keepdim=True)
            each = (energy / mean.clamp_min(torch.finfo(torch.float32).tiny)).mean(0)
            found[name] = found.get(name, 0) + each

        return hook

    hooks = [block.get_submodule(name).register_forward_pre_hook(look(name)) for name in layers]
    try:
        yield found
    finally:
        for each in hooks:
            each.remove()
