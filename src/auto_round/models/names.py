"""Disk names and module names of one model, joined by Transformers' own conversion mapping."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import CheckpointError
from auto_round.facts.tensor import TensorSpec

_NUMBERED = re.compile(r"(.*\.)(\d+)(\..*)")  # greedy: the last number in the name


@dataclass(frozen=True, slots=True)
class DiskTensor:
    """One tensor on disk that goes into a recipe.

    Attributes:
        name: full name on disk.
        pattern: the converter's source pattern that it matches; the name itself where there is no converter.
    """

    name: str
    pattern: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How tensors on disk become tensors of the module tree.

    Attributes:
        key: module name that every piece is renamed to; the first target unless the converter says otherwise.
        targets: full names of the module tensors that come out.
        pieces: what goes in, in the order in which the converter wants it.
        converter: Transformers' converter, never used itself but copied for every use (it collects tensors
            inside itself); None where the one piece is the one target.
        transposed: what the model has as `[in, out]`, or as a stack of such, is wanted the other way round.
    """

    key: str
    targets: tuple[str, ...]
    pieces: tuple[DiskTensor, ...]
    converter: Any | None
    transposed: bool = False

    def make(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """Module tensors by full name.

        Args:
            read: gives the tensor of a name on disk.
            model: the model (weights may be on the meta device) that the converter asks for sizes.
        """
        if self.converter is None:
            tensor = read(self.pieces[0].name)
            return {self.targets[0]: tensor.mT.contiguous() if self.transposed else tensor}
        converter = copy.deepcopy(self.converter)
        for piece in self.pieces:
            converter.add_tensor(self.key, piece.name, piece.pattern, read(piece.name))
        made = converter.convert(self.key, model=model, config=model.config)
        found = {name: t[0] if isinstance(t, list) else t for name, t in made.items()}
        return {name: t.mT.contiguous() for name, t in found.items()} if self.transposed else found


@dataclass(frozen=True, slots=True)
class NameMap:
    """Every tensor on disk put to its use.

    Attributes:
        recipes: one per module tensor (or group of them), in natural order of disk names.
        by_target: module tensor name -> the recipe that makes it.
        orphans: names on disk that no module wants (`mtp.*`, extra layers): copied unchanged on export.
    """

    recipes: tuple[Recipe, ...]
    by_target: Mapping[str, Recipe]
    orphans: tuple[str, ...]

    @property
    def parameters(self) -> dict[str, str]:
        """Tensor on disk -> parameter of the module tree, where both are the same matrix."""
        return {r.pieces[0].name: r.targets[0] for r in self.recipes if len(r.pieces) == len(r.targets) == 1}


def map_names(
    model: Any, disk: Mapping[str, TensorSpec], transposed: Collection[str] = frozenset()
) -> NameMap:
    """Join disk names with the tensors of a model.

    Args:
        model: a Transformers model; its weights may be on the meta device.
        disk: dtype and shape of every tensor on disk.
        transposed: module tensors that lie on disk the other way round.

    Raises:
        CheckpointError: a tensor's shape is not what the configuration asks for.
    """
    wanted: dict[str, Tensor] = model.state_dict()
    drafts, orphans = _collect(model, wanted, disk)
    drafts = [replace(draft, transposed=draft.key in transposed) for draft in drafts]
    recipes = tuple(_finished(draft, model, wanted, disk) for draft in drafts)
    by_target = {target: recipe for recipe in recipes for target in recipe.targets}
    return NameMap(recipes, by_target, tuple(orphans))


def _collect(model: Any, wanted: Mapping[str, Tensor], disk: Iterable[str]) -> tuple[list[Recipe], list[str]]:
    """Recipes whose targets are not yet expanded, and the names that lead nowhere."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    drafts: dict[str, Recipe] = {}
    orphans: list[str] = []
    for name in sorted(disk, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if key not in wanted and name in wanted:
            key, pattern = rename_source_key(name, [], [], prefix, wanted)
        if key not in wanted:
            orphans.append(name)
            continue
        piece = DiskTensor(name, name if pattern is None else pattern)
        old = drafts.get(key)
        if old is None:
            converter = None if pattern is None else copy.deepcopy(converter_of[pattern])
            drafts[key] = Recipe(key, (key,), (piece,), converter)
        elif old.converter is None or pattern is None:
            raise CheckpointError(
                f'tensors "{old.pieces[0].name}" and "{name}" are both the weight "{key}" of this model; '
                "expected one of them: the checkpoint mixes two layouts, save it anew with one"
            )
        else:
            drafts[key] = Recipe(key, old.targets, (*old.pieces, piece), old.converter)
    return list(drafts.values()), orphans


def _finished(
    draft: Recipe, model: Any, wanted: Mapping[str, Tensor], disk: Mapping[str, TensorSpec]
) -> Recipe:
    """The draft with its real targets, found by running the converter on tensors without data.

    That checks the shapes too.
    """
    names = [piece.name for piece in draft.pieces]
    shown = f'"{names[0]}"' + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    shape = wanted[draft.key].shape
    if len(shape) == 3 and len(names) > 1 and (gaps := _gaps(names, shape[0])):
        raise CheckpointError(f"tensors missing: {', '.join(gaps[:8])}; expected one for each of {shape[0]}")

    def read(name: str) -> Tensor:
        return torch.empty(disk[name].shape, dtype=wanted[draft.key].dtype, device="meta")

    try:
        made = draft.make(read, model)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"tensors {shown} cannot be made into the model's weight "
            f'"{draft.key}" {list(shape)}: {error}; some are missing or have wrong shapes'
        ) from error
    targets = tuple(name for name in made if name in wanted)
    for target in targets:
        got, expected = list(made[target].shape), list(wanted[target].shape)
        if got != expected:
            raise CheckpointError(
                f"tensor {shown}: shape {got} on disk, but the configuration asks for {expected} "
                f'("{target}"): config.json and the weights are not of the same model'
            )
    return replace(draft, targets=targets)


def _gaps(names: list[str], count: int) -> list[str]:
    """Missing names in a numbered sequence `0 ... count - 1`."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        if found is None:
            return []
        numbers.setdefault((found[1], found[3]), set()).add(int(found[2]))
    if max(map(len, numbers.values())) == 1 < count:  # the number is the block's: nothing is counted
        return []
    return [f"{a}{n}{b}" for (a, b), have in numbers.items() for n in range(count) if n not in have]


def recipe_for(name: str, names: NameMap, tied: Mapping[str, str]) -> Recipe | None:
    """The recipe of a module tensor, or of one that it is tied with."""
    if name in names.by_target:
        return names.by_target[name]
    shared = tied.get(name, name)
    family = [shared, *(target for target, source in tied.items() if source == shared)]
    return next((names.by_target[n] for n in family if n in names.by_target), None)


def missing_tensors(model: Any, names: NameMap, tied: Mapping[str, str]) -> set[str]:
    """Module tensors that neither the disk nor a tied tensor provides."""
    return {name for name in model.state_dict() if recipe_for(name, names, tied) is None}


LOST = "a shard is missing or config.json belongs to another model"
"""Usual cause of missing weights."""


def check_complete(missing: Iterable[str], where: str, cause: str = LOST) -> None:
    """Refuse a checkpoint that lacks weights.

    Args:
        missing: names of the weights.
        where: the folder.
        cause: what may have happened, and what to do.

    Raises:
        CheckpointError: names them.
    """
    absent = sorted(missing)
    if absent:
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        raise CheckpointError(
            f"{where}: {len(absent)} weights of the model are missing: {', '.join(absent[:8])}{more}; "
            f"expected all of them: {cause}"
        )
