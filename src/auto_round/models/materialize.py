"""Real copies of meta modules: weights in, module out, memory back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from auto_round.errors import InternalError

META = torch.device("meta")


def real_copy(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    replaced: Mapping[int, object],
    dtypes: Mapping[str, torch.dtype],
) -> nn.Module:
    """A copy of a module of the skeleton with real weights; tied tensors stay tied.

    Args:
        module: stays as it is.
        tensors: name inside the module -> value, already in the wanted dtype and on the wanted device.
            Whatever else the module holds must have a value of its own, which is copied.
        device: where those other values go.
        replaced: `id` of an object inside the module -> what stands in its place in the copy.
        dtypes: name inside the module -> dtype of the copy of a value of the module's own.

    Raises:
        InternalError: a tensor has no value.
    """
    memo: dict[int, object] = dict(replaced)
    for owner in module.modules():
        if id(owner) in replaced:
            memo.update({id(t): t for t in [*owner.parameters(), *owner.buffers()]})  # not copied
        # Configurations are shared by all modules of a model and are only read.
        config = owner.__dict__.get("config")
        if config is not None:
            memo[id(config)] = config
    for name, parameter in module.named_parameters():
        if id(parameter) not in memo:
            value = _real(name, parameter, tensors, device, dtypes)
            memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for name, buffer in module.named_buffers():
        if id(buffer) not in memo:
            memo[id(buffer)] = _real(name, buffer, tensors, device, dtypes)
    return copy.deepcopy(module, memo).eval()


def _real(
    name: str,
    meta: Tensor,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
) -> Tensor:
    if name in tensors:
        return tensors[name]
    if meta.device == META:
        raise InternalError(f'no value for "{name}"')
    return meta.detach().to(device, dtypes.get(name, meta.dtype), copy=True)


@contextmanager
def freed_on_exit(module: nn.Module) -> Iterator[nn.Module]:
    """Drop the memory of a module's weights on exit, even if someone keeps the module."""
    try:
        yield module
    finally:
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = tensor.data.new_empty(0)
