"""Names of a model's parameters in its checkpoints, by Transformers' own conversion mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from auto_round.errors import CheckpointError
from auto_round.facts.tensor import TensorSpec
from auto_round.log import logger
from auto_round.models.names import NameMap, Recipe, map_names
from auto_round.models.split import split_recipes

_WRAPPERS = frozenset(("model", "language_model", "text_model"))
"""Containers that the classes of one architecture have or have not around the same layers: the base model in
a causal one, the language model in one with images."""

_ANY_LAYER = ".0.x"
"""Makes the name of a layer of the name of a list of blocks."""


@dataclass(frozen=True, slots=True)
class DiskNames:
    """How an unquantized checkpoint of a model would be named, known without looking at one.

    Attributes:
        model: the model.
        map: recipes of its parameters; empty where Transformers' conversion has no inverse, which makes every
            name on disk the module's own.
        disk: tensor name on disk -> dtype and shape.
        renamings: Transformers' renamings of single tensors.
        split: parameter of experts that is one tensor on disk -> how it is made of quantized ones, which are
            written one by one.
    """

    model: Any
    map: NameMap
    disk: Mapping[str, TensorSpec]
    renamings: Sequence[Any] = ()
    split: Mapping[str, Recipe] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> DiskNames:
        """Names of a model, its weights on any device."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

        renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
        try:
            tensors = revert_weight_conversion(model, model.state_dict())
            disk = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
            names = map_names(model, disk)
            split = split_recipes(model, names, disk)
            pieces = {name: spec for _, specs in split.values() for name, spec in specs.items()}
            recipes = {parameter: recipe for parameter, (recipe, _) in split.items()}
            return cls(model, names, disk | pieces, renamings, recipes)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, CheckpointError) as error:
            logger.debug("names on disk are taken to be those of the modules: %s", error)
            return cls(model, NameMap((), {}, ()), {}, renamings)

    def layer(self, path: str) -> str:
        """Name on disk, without `.weight`, of a linear layer of the module tree."""
        recipe = self.map.by_target.get(f"{path}.weight")
        name = recipe.pieces[0].name if recipe is not None and len(recipe.pieces) == 1 else path
        return name.removesuffix(".weight")

    def recipe(self, parameter: str) -> Recipe | None:
        """How several tensors on disk become one parameter; None where one tensor is one parameter."""
        recipe = self.split.get(parameter) or self.map.by_target.get(parameter)
        return recipe if recipe is not None and recipe.converter is not None else None

    def inside(self, layer: str) -> str:
        """Path in the module tree at which a packed matrix of that name on disk is looked for."""
        from transformers.core_model_loading import rename_source_key

        renamed: str = rename_source_key(f"{layer}.qweight", list(self.renamings), [])[0]
        return renamed.removesuffix(".qweight")

    def essence(self, layer: str) -> str:
        """A layer's path in the module tree without the containers that depend on the model's class."""
        return _unwrapped(self.inside(layer))


@dataclass(frozen=True, slots=True)
class ConfigNames:
    """Under which names a configuration may speak of a layer.

    Transformers loads one folder with several classes, whose trees differ in the containers around the same
    layers: it adds and strips the base model's, and renames others. A configuration was written for one.

    Attributes:
        disk: names of the model.
        written: essence of each layer that the configuration names -> the name.
        blocks: essence of each list of blocks that it names -> the name.
    """

    disk: DiskNames
    written: Mapping[str, str]
    blocks: Mapping[str, str]

    @classmethod
    def of(cls, disk: DiskNames, layers: Iterable[str], blocks: Iterable[str]) -> ConfigNames:
        """Names in a configuration of layers and of lists of blocks, for example `model.layers`."""
        lists = {disk.essence(f"{name}{_ANY_LAYER}").removesuffix(_ANY_LAYER): name for name in blocks}
        return cls(disk, {disk.essence(name): name for name in layers}, lists)

    def of_layer(self, path: str) -> tuple[str, ...]:
        """All names of a linear layer, its path in the module tree first."""
        base = getattr(self.disk.model, "base_model_prefix", "")  # models of diffusers have none
        prefix = f"{base}." if base else ""
        names: dict[str, None] = {}
        for name in (path, self.disk.layer(path)):
            bare = name.removeprefix(prefix)
            names |= dict.fromkeys((name, bare, f"{prefix}{bare}"))
            core = _unwrapped(name)
            for essence, written in self.blocks.items():
                if core.startswith(f"{essence}."):
                    names[f"{written}{core.removeprefix(essence)}"] = None
        core = self.disk.essence(path)
        if core in self.written:
            names[self.written[core]] = None
        return tuple(names)


def _unwrapped(name: str) -> str:
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part not in _WRAPPERS), 0)
    return ".".join(parts[first:])
