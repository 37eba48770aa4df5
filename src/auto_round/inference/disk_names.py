"""Names of a model's parameters in its checkpoints, by Transformers' own conversion mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.errors import CheckpointError
from auto_round.layouts.layout import TensorSpec
from auto_round.log import logger
from auto_round.models.names import NameMap, Recipe, map_names


@dataclass(frozen=True, slots=True)
class DiskNames:
    """How an unquantized checkpoint of a model would be named, known without looking at one.

    Attributes:
        model: the model.
        map: recipes of its parameters; empty where Transformers' conversion has no inverse, which makes every
            name on disk the module's own.
        disk: tensor name on disk -> dtype and shape.
    """

    model: Any
    map: NameMap
    disk: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, model: Any) -> DiskNames:
        """Names of a model, its weights on any device."""
        from transformers.core_model_loading import revert_weight_conversion

        try:
            tensors = revert_weight_conversion(model, model.state_dict())
            disk = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
            return cls(model, map_names(model, disk), disk)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, CheckpointError) as error:
            logger.debug("names on disk are taken to be those of the modules: %s", error)
            return cls(model, NameMap((), {}, ()), {})

    def layer(self, path: str) -> str:
        """Name on disk, without `.weight`, of a linear layer of the module tree."""
        recipe = self.map.by_target.get(f"{path}.weight")
        name = recipe.pieces[0].name if recipe is not None and len(recipe.pieces) == 1 else path
        return name.removesuffix(".weight")

    def recipe(self, parameter: str) -> Recipe | None:
        """How several tensors on disk become one parameter; None where one tensor is one parameter."""
        recipe = self.map.by_target.get(parameter)
        return recipe if recipe is not None and recipe.converter is not None else None

    def inside(self, layer: str) -> str:
        """Path in the module tree at which a packed matrix of that name on disk is looked for."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [t for t in get_model_conversion_mapping(self.model) if isinstance(t, WeightRenaming)]
        renamed: str = rename_source_key(f"{layer}.qweight", renamings, [])[0]
        return renamed.removesuffix(".qweight")
