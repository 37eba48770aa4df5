"""Layers and blocks of a model: module tree, roles and disk names put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from auto_round.errors import Refusal
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.facts.layer import Block, Layer, Role
from auto_round.facts.tensor import MATRIX, TensorSpec
from auto_round.models.config_facts import expert_counts
from auto_round.models.families import flow_of
from auto_round.models.further import further_layers
from auto_round.models.fused import heights, lies_turned, split, taken_whole
from auto_round.models.loading import rebuilding_methods
from auto_round.models.names import NameMap, Recipe
from auto_round.models.places import Locator
from auto_round.models.roles import (
    bare_matrices,
    find_block_lists,
    find_head,
    find_tower_blocks,
    fused_experts,
    is_linear,
    role_in_block,
)
from auto_round.models.weight_readers import ASKED, read_elsewhere


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a model consists of.

    Attributes:
        layers: matrices that could be quantized: in blocks, outside, head.
        blocks: the blocks of all lists.
        head: disk name of the head's layer.
        unsupported: matrices that stay at 16 bits because they cannot be addressed, and why.
    """

    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    head: str | None
    unsupported: tuple[Refusal, ...]


def dissect(model: Any, names: NameMap, disk: Mapping[str, TensorSpec], tied: Mapping[str, str]) -> Anatomy:
    """Find the layers and blocks of a model.

    Args:
        model: the model, weights on any device.
        names: its tensors' recipes.
        disk: dtype and shape of every tensor on disk.
        tied: module tensor -> module tensor whose data it shares.
    """
    return _Dissection(model, names, disk, tied).run()


class _Dissection:
    """The working state of `dissect`: tables looked at for every module, and what was refused."""

    def __init__(
        self, model: Any, names: NameMap, disk: Mapping[str, TensorSpec], tied: Mapping[str, str]
    ) -> None:
        self._model = model
        self._names = names
        self._disk = disk
        self._tied = tied
        self._experts = expert_counts(model.config)
        self._read = read_elsewhere(model)
        self._locator = Locator(model, disk)
        self._refusals: list[Refusal] = []

    def run(self) -> Anatomy:
        lists = find_block_lists(self._model)
        paths = [path for members in lists for path in members]
        list_of = {path: number for number, members in enumerate(lists) for path in members}
        head = find_head(self._model)
        layers: list[Layer] = []
        blocks: list[Block] = []
        for index, path in enumerate(paths):
            block = self._model.get_submodule(path)
            layers.extend(self._in_block(block, path, index))
            blocks.append(Block(index, path, self._disk_prefix(path), flow_of(block), list_of[path]))
        towers = tuple(f"{path}." for path in find_tower_blocks(self._model))
        for path, module in self._model.named_modules():
            inside = any(path.startswith(f"{p}.") for p in paths)
            if is_linear(module) and not inside and path != head:
                role = Role.TOWER if path.startswith(towers) else Role.OUTSIDE
                layers.extend(self._matrices(f"{path}.weight", None, role))
        layers.extend(further_layers(self._names.orphans, self._disk, layers, blocks))
        heads = [] if head is None else list(self._head(head))
        return Anatomy(
            (*layers, *heads), tuple(blocks), heads[0].name if heads else None, tuple(self._refusals)
        )

    def _in_block(self, block: nn.Module, prefix: str, index: int) -> Iterator[Layer]:
        for path, module in block.named_modules():
            full = f"{prefix}.{path}" if path else prefix
            if not isinstance(module, nn.Linear):
                yield from self._bare(module, full, index)
                continue
            role = role_in_block(path, module.out_features, self._experts)
            if not is_linear(module):
                if role is not Role.ROUTER:  # which is kept in any case
                    how = f"its class {type(module).__name__} multiplies in its own way"
                    self._refuse(f"{full}.weight", how)
            elif self._read.get(full, ASKED) != ASKED:
                self._refuse(f"{full}.weight", self._read[full])
            else:
                yield from self._matrices(f"{full}.weight", index, role)

    def _bare(self, module: nn.Module, path: str, index: int) -> Iterator[Layer]:
        """Own parameters of a module that is not a linear layer: fused experts, or weights to be kept."""
        for name in fused_experts(module):
            parameter = f"{path}.{name}"
            recipe = self._names.by_target.get(parameter)
            if recipe is not None and len(self._disk[recipe.pieces[0].name].shape) > MATRIX:
                yield from self._fused(module, recipe, index)
            else:
                yield from self._matrices(parameter, index, Role.EXPERT)
        for name in bare_matrices(module, self._experts):
            self._refuse(f"{path}.{name}", "it is a matrix outside of a linear layer")

    def _fused(self, module: nn.Module, recipe: Recipe, index: int) -> Iterator[Layer]:
        """Layers of a parameter of experts that is one tensor on disk."""
        parameter, (piece, *others) = recipe.targets[0], recipe.pieces
        name, spec = parameter.rpartition(".")[2], self._disk[piece.name]
        made = tuple(module.get_parameter(name).shape)
        found = split(module, name, piece.name)
        turned = lies_turned(recipe.converter, spec.shape == made)
        if others or turned is None:
            found = "the conversion from disk does more than turn its matrices"
        if isinstance(found, str):
            self._refuse(parameter, found)
            return
        for each, height in zip(found, heights(made, found), strict=True):
            yield Layer(
                name=each.name,
                tensor=piece.name,
                parameter=parameter,
                shape=(height, made[2]),
                dtype=spec.dtype,
                block=index,
                role=Role.EXPERT,
                expert=each.place.expert,
                rows=each.place.rows,
                transposed=turned is not recipe.transposed,
                fused=True,
                whole=taken_whole(module),
                rebuilt=COMPRESSED_TENSORS in rebuilding_methods(module),
            )

    def _matrices(self, parameter: str, index: int | None, role: Role) -> Iterator[Layer]:
        """Layers that make up one parameter: itself, or one per expert and projection."""
        recipe = self._names.by_target.get(parameter)
        if recipe is None:
            self._refuse(parameter, "it shares the weight of another layer")
            return
        places = self._locator.locate(recipe)
        if isinstance(places, str):
            self._refuse(parameter, places)
            return
        if any(len(self._disk[name].shape) != MATRIX for name in places):
            self._refuse(parameter, "it is no matrix on disk")
            return
        for name, place in sorted(
            places.items(), key=lambda item: (item[1].expert or 0, item[1].rows or (0, 0))
        ):
            spec = self._disk[name]
            shape = (spec.shape[0], spec.shape[1])
            yield Layer(
                transposed=recipe.transposed,
                asked=parameter.removesuffix(".weight") in self._read,
                name=name.removesuffix(".weight"),
                tensor=name,
                parameter=parameter,
                shape=(shape[1], shape[0]) if recipe.transposed else shape,
                dtype=spec.dtype,
                block=index,
                role=role,
                expert=place.expert,
                rows=place.rows,
            )

    def _head(self, path: str) -> Iterator[Layer]:
        parameter = f"{path}.weight"
        recipe = self._names.by_target.get(parameter) or self._names.by_target.get(
            self._tied.get(parameter, "")
        )
        if recipe is None or recipe.converter is not None:
            return
        (piece,) = recipe.pieces
        spec = self._disk[piece.name]
        own = parameter in self._names.by_target
        yield Layer(
            name=piece.name.removesuffix(".weight") if own else path,
            tensor=piece.name,
            parameter=parameter,
            shape=(spec.shape[0], spec.shape[1]),
            dtype=spec.dtype,
            block=None,
            role=Role.HEAD,
        )

    def _disk_prefix(self, path: str) -> str:
        """Beginning of most of a block's names on disk, up to the block's number.

        A few may lie elsewhere: some checkpoints keep the queries of all blocks side by side in one tensor.
        """
        number = path.rpartition(".")[2]
        recipes = (r for target, r in self._names.by_target.items() if target.startswith(f"{path}."))
        places = Counter(place for r in recipes for p in r.pieces for place in _up_to(number, p.name))
        return max(places, key=lambda place: (places[place], len(place)), default=path)

    def _refuse(self, parameter: str, reason: str) -> None:
        recipe = self._names.by_target.get(parameter)
        who = parameter if recipe is None else recipe.pieces[0].name
        self._refusals.append(Refusal(who, reason, "kept at 16 bits"))


def _up_to(number: str, name: str) -> Iterator[str]:
    """Beginnings of a dotted name that end with a number: `a.0` and `a.0.b.1` of `a.0.b.1.c`."""
    parts = name.split(".")
    yield from (".".join(parts[: i + 1]) for i, part in enumerate(parts) if part == number)
