"""Modules of a block on other devices than the main one: weights are put there, activations come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from auto_round.errors import InternalError
from auto_round.models.divided_experts import DividedExperts
from auto_round.models.matrix_experts import MatrixExperts


def divide_modules(group: nn.Module, shares: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Cut modules of fused experts of a group of blocks into pieces.

    Args:
        group: a copy that belongs to the run; it is changed.
        shares: module of the group -> the experts of each piece.
    """
    for name, each in shares.items():
        parent, _, own = name.rpartition(".")
        whole = group.get_submodule(name)
        if not isinstance(whole, MatrixExperts):
            raise InternalError(f"{name} cannot be cut into pieces")
        setattr(group.get_submodule(parent), own, DividedExperts(whole, each))


def put_modules(group: nn.Module, devices: Mapping[str, torch.device], main: torch.device) -> None:
    """Put a group of blocks on its devices; where it is called, nothing shows but time.

    Args:
        group: a copy that belongs to the run; it is changed.
        devices: module of the group -> its device.
        main: where everything else goes, and where modules take their inputs from and give their outputs to.
    """
    for name, module in group.named_modules():
        device = _device_of(name, devices, main)
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(parameter.detach().to(device), requires_grad=False))
        for own, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, own, buffer.to(device))
        if device != main and name in devices:
            module.register_forward_pre_hook(partial(_fetch, device), with_kwargs=True)
            module.register_forward_hook(partial(_hand_back, main))


def _device_of(module: str, devices: Mapping[str, torch.device], main: torch.device) -> torch.device:
    """Device of a module, or of the one that it is part of."""
    while module and module not in devices:
        module = module.rpartition(".")[0]
    return devices.get(module, main)


def _fetch(
    device: torch.device, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    moved: tuple[tuple[Any, ...], dict[str, Any]] = tree.tree_map_only(
        Tensor, lambda x: x.to(device), (args, kwargs)
    )
    return moved


def _hand_back(main: torch.device, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    del module, args
    return tree.tree_map_only(Tensor, lambda x: x.to(main), output)
