"""Modules of a block on other devices than the main one: weights are put there, activations come and go."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree


def put_modules(group: nn.Module, devices: Mapping[str, torch.device], main: torch.device) -> None:
    """Put a group of blocks on its devices; where it is called, nothing shows but time.

    Args:
        group: a copy that belongs to the run; it is changed.
        devices: module of the group -> its device.
        main: where everything else goes, and where modules take their inputs from and give their outputs to.
    """
    for name, module in group.named_modules():
        device = devices.get(name, main)
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(parameter.detach().to(device), requires_grad=False))
        for own, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, own, buffer.to(device))
        if device != main:
            module.register_forward_pre_hook(partial(_fetch, device), with_kwargs=True)
            module.register_forward_hook(partial(_hand_back, main))


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
