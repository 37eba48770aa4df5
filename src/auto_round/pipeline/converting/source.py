"""A quantized folder as exporters want a model: layers, blocks and a plan, made from names and headers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from auto_round.checkpoint.reader import Checkpoint
from auto_round.config.groups import CalibrationOptions, TuneOptions
from auto_round.consumers.folder import read_folder
from auto_round.errors import CheckpointError, Refusal, UnsupportedError
from auto_round.export.exporter import TuningFacts
from auto_round.facts.layer import Block, Layer, Role
from auto_round.facts.tensor import TensorSpec
from auto_round.inference.qlinear import ORDER, named
from auto_round.layouts.awq import AWQ
from auto_round.layouts.gptq import GPTQ
from auto_round.models.roles import role_in_block
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor
from auto_round.schemes.condense import some
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.stored.formats import StoredFormats, StoredLayer
from auto_round.stored.matrices import OTHER, Matrix

_BLOCK = re.compile(r"(.+?\.(\d+))\.(.+)")
_MIDDLES = torch.tensor(-0x77777778, dtype=torch.int32, device="cpu")
"""A word of eight zero points of 8: 0x88888888."""
_HEADS = frozenset({"lm_head", "embed_out"})
"""Last component of the output head's name; the second is GPT-NeoX's."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Stored:
    """What an exporter needs of a quantized folder.

    Attributes:
        folder: the folder.
        config: its `config.json`.
        layers: packed matrices, the plain ones in blocks, and the head.
        blocks: its blocks.
        plan: schemes of the packed ones; the others are kept.
        tensors: everything on disk, packed tensors of a layer as one `weight`.
        facts: how it was tuned, as far as its configuration says.
        formats: what its configuration says of each layer.
        shapes: layer -> `(out, in)`.
        parameters: tensor -> parameter of Transformers' model that it becomes, where that is known.
    """

    folder: Path
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    plan: Plan
    tensors: Mapping[str, TensorSpec]
    facts: TuningFacts
    formats: StoredFormats
    shapes: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, str] = field(default_factory=dict)

    def read(self, checkpoint: Checkpoint, layer: str) -> QTensor:
        """Codes, steps and zero points of a layer, as they lie on disk.

        Raises:
            CheckpointError: tensors that contradict the configuration.
            UnsupportedError: inputs reordered by activation.
        """
        fmt = self.plan.format_of(layer)
        how = self.formats.layer((layer,))
        if fmt is None or how is None:
            raise CheckpointError(f"{self.folder}: {layer} is not packed")
        shape, layout = self.shapes[layer], how.layout
        if isinstance(layout, GPTQ):
            layout = replace(layout, indexed=f"{layer}.{ORDER}" in checkpoint)
        parts = {suffix: checkpoint.read(f"{layer}.{suffix}") for suffix in layout.spec(fmt, shape)}
        try:
            return layout.unpack(parts, fmt, shape)
        except UnsupportedError as error:
            raise named(layer, error) from error
        except CheckpointError as error:
            raise CheckpointError(f'layer "{layer}": {error}') from error


def open_stored(path: Path, checkpoint: Checkpoint) -> Stored:
    """Read a folder's configuration and headers.

    Raises:
        ConfigError: no folder of a quantized model.
        CheckpointError: configuration and tensors contradict each other.
        UnsupportedError: weights that are no packed whole numbers.
    """
    folder = read_folder(path)
    matrices = [m for m in folder.matrices if m.packed or m.in_block or _is_head(m)]
    other = [m.name for m in folder.packed if m.order == OTHER]
    if other:
        raise UnsupportedError(
            f"{path} cannot be converted",
            [
                Refusal(
                    "convert", f"reads packed whole numbers of auto-round, gptq and awq, not {folder.format}"
                )
            ],
        )
    formats = StoredFormats.of_folder(folder.quantization, [m.name for m in folder.matrices])
    _refuse_filled(path, formats, folder.matrices)
    flat = _is_symmetric_awq(checkpoint, formats, folder.packed)
    schemes = {m.name: _scheme(formats, m, flat=flat) if m.packed else None for m in matrices}
    top = Counter(s for s in schemes.values() if s is not None).most_common(1)[0][0]
    dtype = getattr(torch, folder.dtype, torch.float16)
    layers = _layers(matrices, dtype)
    entries = {name: PlanEntry(scheme, "as stored" if scheme else "kept") for name, scheme in schemes.items()}
    return Stored(
        path,
        folder.config,
        layers,
        _blocks(matrices),
        Plan(top, entries),
        _tensors(checkpoint, layers, matrices),
        _facts(folder.quantization),
        formats,
        {layer.name: layer.shape for layer in layers},
    )


def with_steps(plan: Plan, dtype: str) -> Plan:
    """The same plan with steps of another dtype."""
    entries = {
        name: entry
        if entry.scheme is None
        else replace(entry, scheme=replace(entry.scheme, scale_dtype=dtype))
        for name, entry in plan.entries.items()
    }
    return replace(plan, scheme=replace(plan.scheme, scale_dtype=dtype), entries=entries)


def _refuse_filled(path: Path, formats: StoredFormats, matrices: Sequence[Matrix]) -> None:
    """Refuse rows that are stored longer than they are: headers do not tell their own length.

    Raises:
        UnsupportedError: packed rows of a length that nothing else in the folder has.
    """
    lengths = {m.shape[0] for m in matrices} | {m.shape[1] for m in matrices if not m.packed}
    packed = [m for m in matrices if m.packed and m.shape[1] not in lengths]
    longer = [m.name for m in packed if (how := formats.layer((m.name,))) is not None and _is_filled(how)]
    if longer:
        reason = f"rows are filled up to whole groups, and do not say how long they are: {some(longer)}"
        remedy = "convert a folder with groups that divide the rows, or quantize the original again"
        raise UnsupportedError(f"{path} cannot be converted", [Refusal("convert", reason, remedy)])


def _is_filled(how: StoredLayer) -> bool:
    return isinstance(how.layout, GPTQ) and how.layout.filled


def _is_symmetric_awq(checkpoint: Checkpoint, formats: StoredFormats, packed: Sequence[Matrix]) -> bool:
    """Whether an AWQ folder holds symmetric weights, which its configuration has no word for.

    AWQ readers take zero points from the tensors in any case; symmetric weights have the middle throughout.
    """
    found = [formats.layer((m.name,)) for m in packed]
    if not all(how is not None and isinstance(how.layout, AWQ) for how in found):
        return False
    return all(bool((checkpoint.read(f"{m.name}.qzeros") == _MIDDLES).all()) for m in packed)


def _scheme(formats: StoredFormats, matrix: Matrix, *, flat: bool) -> QuantizationScheme:
    """Scheme of a packed matrix: from the configuration, checked against the headers.

    Args:
        formats: the configuration.
        matrix: the matrix.
        flat: all zero points are in the middle, whatever the configuration says.
    """
    how = formats.layer((matrix.name,))
    if how is None or not _agrees(how.format, matrix):
        fmt = None if how is None else how.format
        said = "16 bits" if fmt is None else f"{fmt.grid.bits} bits, groups of {fmt.group.size}"
        raise CheckpointError(
            f'layer "{matrix.name}" is stored with {matrix.bits} bits and {matrix.groups} groups a row of '
            f"{matrix.shape[1]}, but the configuration says {said}"
        )
    step = str(matrix.scale_dtype).removeprefix("torch.")
    bits, size = how.format.grid.bits, how.format.group.size
    return QuantizationScheme(bits, size, flat or how.sym, scale_dtype=step)


def _agrees(fmt: Format, matrix: Matrix) -> bool:
    return fmt.grid.bits == matrix.bits and fmt.group.count(matrix.shape[1]) == matrix.groups


def _layers(matrices: Sequence[Matrix], dtype: torch.dtype) -> tuple[Layer, ...]:
    counts = [int(found[1]) + 1 for m in matrices if (found := _EXPERT.search(m.name))]
    experts = frozenset({max(counts)} if counts else ())
    numbers = {prefix: i for i, prefix in enumerate(_prefixes(matrices))}
    made = []
    for matrix in matrices:
        found = _BLOCK.fullmatch(matrix.name)
        if found is not None:
            block, role = numbers[found[1]], role_in_block(found[3], matrix.shape[0], experts)
        else:
            block, role = None, Role.HEAD if _is_head(matrix) else Role.OUTSIDE
        tensor = f"{matrix.name}.weight"
        made.append(Layer(matrix.name, tensor, tensor, matrix.shape, dtype, block, role))
    return tuple(made)


def _is_head(matrix: Matrix) -> bool:
    return matrix.name.rpartition(".")[2] in _HEADS


def _prefixes(matrices: Sequence[Matrix]) -> list[str]:
    """Beginnings of the blocks' names, in the order of their numbers."""
    found = {match[1]: int(match[2]) for m in matrices if (match := _BLOCK.fullmatch(m.name))}
    return sorted(found, key=lambda prefix: (prefix.rpartition(".")[0], found[prefix]))


def _blocks(matrices: Sequence[Matrix]) -> tuple[Block, ...]:
    return tuple(Block(i, prefix, prefix) for i, prefix in enumerate(_prefixes(matrices)))


def _tensors(
    checkpoint: Checkpoint, layers: Sequence[Layer], matrices: Sequence[Matrix]
) -> dict[str, TensorSpec]:
    home = {name: m.name for m in matrices if m.packed for name in m.tensors}
    by_name = {layer.name: layer for layer in layers}
    tensors: dict[str, TensorSpec] = {}
    for name in checkpoint.names:
        if name in home:
            layer = by_name[home[name]]
            tensors[layer.tensor] = TensorSpec(layer.dtype, layer.shape)
        else:
            info = checkpoint.info(name)
            tensors[name] = TensorSpec(info.dtype, info.shape)
    return tensors


def _facts(config: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    """Options of the tuning run among the keys of a configuration."""
    known = {f.name for group in (TuneOptions, CalibrationOptions) for f in fields(group)}
    return {k: v for k, v in config.items() if k in known and isinstance(v, (bool, int, float, str))}
