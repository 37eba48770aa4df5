"""A quantized folder as exporters want a model: layers, blocks and a plan, made from names and headers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from auto_round.checkpoint.reader import Checkpoint
from auto_round.config.groups import CalibrationOptions
from auto_round.config.tuning import TuneOptions
from auto_round.consumers.folder import Folder, read_folder, read_quantization
from auto_round.errors import Refusal, UnsupportedError
from auto_round.export.exporter import TuningFacts
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.facts.layer import Block, Layer, Role
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.awq import AWQ
from auto_round.models.roles import role_in_block
from auto_round.schemes.condense import some
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.plan import Plan
from auto_round.schemes.vocabulary import SCALE_DTYPE_SPELLINGS
from auto_round.stored.matrices import Matrix
from auto_round.stored.methods import understand
from auto_round.stored.packed import StoredWeight

_BLOCK = re.compile(r"(.+?\.(\d+))\.(.+)")
_MIDDLES = torch.tensor(-0x77777778, dtype=torch.int32, device="cpu")
"""A word of eight zero points of 8: 0x88888888."""
_HEADS = frozenset({"lm_head", "embed_out"})
"""Last component of the output head's name; the second is GPT-NeoX's."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class QuantizedFolder:
    """What an exporter needs of a quantized folder.

    Attributes:
        folder: the folder.
        config: its `config.json`.
        layers: packed matrices, the plain ones in blocks, and the head.
        blocks: its blocks.
        plan: schemes of the packed ones; the others are kept.
        tensors: everything on disk, packed tensors of a layer as one `weight`.
        facts: how it was tuned, as far as its configuration says.
        packed: layer -> where its codes lie.
        parameters: tensor -> parameter of Transformers' model that it becomes, where that is known.
    """

    folder: Path
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    plan: Plan
    tensors: Mapping[str, TensorSpec]
    facts: TuningFacts
    packed: Mapping[str, StoredWeight]
    parameters: Mapping[str, str] = field(default_factory=dict)


def open_stored(path: Path, checkpoint: Checkpoint) -> QuantizedFolder:
    """Read a folder's configuration and headers.

    Raises:
        ConfigError: no folder of a quantized model.
        CheckpointError: configuration and tensors contradict each other.
        UnsupportedError: weights stored in a way that is not known, or that no scheme describes.
    """
    _, quantization = read_quantization(path)
    found, spare = understand(quantization, checkpoint)
    _refuse(path, quantization, found)
    folder = read_folder(path)
    if _is_symmetric_awq(checkpoint, found):
        found = [_symmetric(each) for each in found]
    packed = {each.layer: _multiplied(each, folder) for each in found}
    matrices = [m for m in folder.matrices if m.name in packed or m.in_block or _is_head(m)]
    schemes = {m.name: packed[m.name].scheme if m.name in packed else None for m in matrices}
    top = Counter(s for s in schemes.values() if s is not None).most_common(1)[0][0]
    layers = _layers(matrices, packed, getattr(torch, folder.dtype, torch.float16))
    entries = {name: PlanEntry(scheme, "as stored" if scheme else "kept") for name, scheme in schemes.items()}
    return QuantizedFolder(
        path,
        folder.config,
        layers,
        _blocks(matrices),
        Plan(top, entries),
        _tensors(checkpoint, layers, packed, spare),
        _facts(folder.quantization),
        packed,
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


def _refuse(path: Path, config: Mapping[str, Any], found: Sequence[StoredWeight]) -> None:
    """Refuse what no plan of ours describes.

    Raises:
        UnsupportedError: stacks, numbers without a scheme, or scales of a cache.
    """
    stacks = [each.tensor for each in found if each.stack is not None]
    nameless = [each.tensor for each in found if each.scheme is None and each.stack is None]
    refusals = [
        *([Refusal("convert", f"takes no stacks of experts: {some(stacks)}")] if stacks else []),
        *([Refusal("convert", f"no scheme describes {some(nameless)}")] if nameless else []),
    ]
    if config.get("kv_cache_scheme"):
        refusals.append(Refusal("convert", "scales of the cache (kv_cache_scheme) have no place elsewhere"))
    if refusals:
        remedy = "auto-round --model FOLDER quantizes it anew"
        first, *rest = refusals
        raise UnsupportedError(f"{path} cannot be converted", [replace(first, remedy=remedy), *rest])


def _is_symmetric_awq(checkpoint: Checkpoint, packed: Sequence[StoredWeight]) -> bool:
    """Whether an AWQ folder holds symmetric weights, which its configuration has no word for.

    AWQ readers take zero points from the tensors in any case; symmetric weights have the middle throughout.
    """
    if not all(isinstance(each.layout, AWQ) for each in packed):
        return False
    return all(bool((checkpoint.read(each.parts["qzeros"]) == _MIDDLES).all()) for each in packed)


def _multiplied(packed: StoredWeight, folder: Folder) -> StoredWeight:
    """The same matrix with what its readers round it to before they multiply.

    compressed-tensors does so to the model's dtype, which other folders say of weights without steps.
    """
    theirs = folder.method == COMPRESSED_TENSORS and folder.dtype in SCALE_DTYPE_SPELLINGS
    if packed.scheme is None or not theirs or "step" in packed.format.rule.stored:
        return packed
    return replace(packed, scheme=replace(packed.scheme, scale_dtype=folder.dtype))


def _symmetric(packed: StoredWeight) -> StoredWeight:
    """The same matrix without zero points, all of which are in the middle."""
    scheme = None if packed.scheme is None else replace(packed.scheme, sym=True)
    fmt = None if scheme is None else scheme.weight_format()
    return packed if fmt is None else replace(packed, scheme=scheme, format=fmt)


def _layers(
    matrices: Sequence[Matrix], packed: Mapping[str, StoredWeight], dtype: torch.dtype
) -> tuple[Layer, ...]:
    counts = [int(found[1]) + 1 for m in matrices if (found := _EXPERT.search(m.name))]
    experts = frozenset({max(counts)} if counts else ())
    numbers = {prefix: i for i, prefix in enumerate(_prefixes(matrices))}
    made = []
    for matrix in matrices:
        found = _BLOCK.fullmatch(matrix.name)
        shape = packed[matrix.name].shape if matrix.name in packed else matrix.shape
        if found is not None:
            block, role = numbers[found[1]], role_in_block(found[3], shape[0], experts)
        else:
            block, role = None, Role.HEAD if _is_head(matrix) else Role.OUTSIDE
        tensor = f"{matrix.name}.weight"
        made.append(Layer(matrix.name, tensor, tensor, shape, dtype, block, role))
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
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    packed: Mapping[str, StoredWeight],
    spare: Collection[str],
) -> dict[str, TensorSpec]:
    home = {name: layer for layer, each in packed.items() for name in each.tensors}
    by_name = {layer.name: layer for layer in layers}
    tensors: dict[str, TensorSpec] = {}
    for name in checkpoint.names:
        if name in home:
            layer = by_name[home[name]]
            tensors[layer.tensor] = TensorSpec(layer.dtype, layer.shape)
        elif name not in spare:
            tensors[name] = checkpoint.spec(name)
    return tensors


def _facts(config: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    """Options of the tuning run among the keys of a configuration."""
    known = {f.name for group in (TuneOptions, CalibrationOptions) for f in fields(group)}
    return {k: v for k, v in config.items() if k in known and isinstance(v, (bool, int, float, str))}
