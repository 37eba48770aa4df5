"""A model that is already in memory, served block by block and never modified."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.models import causal_attention
from auto_round.models.anatomy import dissect
from auto_round.models.assembled import AssembledSource
from auto_round.models.materialize import META
from auto_round.models.names import Recipe, map_names
from auto_round.models.parts import ModelParts
from auto_round.models.skeleton import as_saved, saved_specs, straighten, tied_weights
from auto_round.models.source import name_on_disk
from auto_round.numerics.smoothing import Rescaling


class LiveSource(AssembledSource):
    """A `ModelSource` over a Transformers model in memory.

    Names on disk are those that `save_pretrained` would write. Every tensor that is handed out is a copy.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None = None) -> None:
        """Look at the model; no weight is copied.

        Args:
            model: a causal language model of Transformers with its weights on any device.
            dtype: dtype in which blocks compute and outputs keep the weights; None for the model's own.

        Raises:
            ConfigError: not a Transformers model.
            UnsupportedError: quantized already, or without decoder blocks.
        """
        _check_usable(model)
        self._state: Mapping[str, Tensor] = model.state_dict()
        skeleton = _skeleton_of(model)
        tied = {t: s for t, s in tied_weights(model).items() if _same(self._state[t], self._state[s])}
        disk = saved_specs(skeleton, tied)
        names = map_names(skeleton, disk, straighten(skeleton))
        anatomy = dissect(skeleton, names, disk, tied)
        super().__init__(ModelParts(skeleton, dtype or model.dtype, disk, names, tied, anatomy, dtype))
        self._recipes = {piece.name: recipe for recipe in names.recipes for piece in recipe.pieces}
        self._places = {layer.tensor: layer for layer in self.layers}

    def rescaled(self, changes: Mapping[str, Rescaling]) -> LiveSource:
        """The same model with some of its tensors rescaled when they are asked for; this one stays as it is.

        Args:
            changes: tensor as it would be named on disk -> what becomes of it.
        """
        here = {name: changes[disk] for name in self._state if (disk := name_on_disk(self, name)) in changes}
        found = copy.copy(self)
        found._state = _RescaledState(self._state, here)
        return found

    @property
    def folder(self) -> None:
        """None: there is no folder."""
        return

    @property
    def files(self) -> None:
        """None: there are no files."""
        return

    def read_tensor(self, name: str) -> Tensor:
        """Any tensor of `tensors`, in the name and shape that it would have on disk."""
        recipe = self._recipes[name]
        layer = self._places.get(name)
        if recipe.converter is None or layer is None or layer.fused:
            made = as_saved(self._parts.model, {t: self._state[t] for t in recipe.targets})
            return made[name].detach().to("cpu", copy=True).contiguous()
        weight = self._state[recipe.targets[0]].detach()
        if layer.expert is not None:
            weight = weight[layer.expert]
        if layer.rows is not None:
            weight = weight[slice(*layer.rows)]
        return weight.to("cpu", copy=True).contiguous()

    def _fetch(self, recipe: Recipe, dtype: torch.dtype) -> Mapping[str, Tensor]:
        kept = self._kept_dtype(recipe, dtype)  # blocks see what outputs hold
        found = {t: self._state[t].detach().to(kept, copy=True).to(dtype) for t in recipe.targets}
        return {t: w.mT.contiguous() for t, w in found.items()} if recipe.transposed else found


class _RescaledState(Mapping[str, Tensor]):
    """The tensors of a model in memory, some of them rescaled each time they are asked for."""

    def __init__(self, state: Mapping[str, Tensor], changes: Mapping[str, Rescaling]) -> None:
        self._state, self._changes = state, changes

    def __getitem__(self, name: str) -> Tensor:
        change = self._changes.get(name)
        return self._state[name] if change is None else change.of(self._state[name].detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _check_usable(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"got a {type(model).__name__}; expected a Transformers causal language model or a folder. "
            "For any other module tune its blocks one by one with quantize_block"
        )
    if model.config.to_dict().get("quantization_config"):
        raise UnsupportedError(
            "this model in memory is quantized already; expected 16- or 32-bit weights",
            [
                Refusal(
                    "models", "only folders are unpacked as they are read", "give the folder, or the original"
                )
            ],
        )
    absent = [name for name, weight in model.named_parameters() if weight.device == META]
    if absent:
        raise ConfigError(
            f'{len(absent)} weights of this model are not in memory, the first is "{absent[0]}"; '
            "expected a fully loaded model: load it without offloading, or give its folder, which is streamed"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _skeleton_of(model: Any) -> Any:
    """A copy of a model with its parameters on the meta device and its derived buffers as they are."""
    memo: dict[int, object] = {}
    saved = model.state_dict().keys()
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=META), requires_grad=False)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in saved:
            memo[id(buffer)] = torch.empty_like(buffer, device=META)
    skeleton = copy.deepcopy(model, memo).eval()
    causal_attention.install(skeleton)
    return skeleton
