"""A device that is no GPU but keeps apart from the host as one: its tensors do not mix with those of the CPU.

They hold their numbers in a tensor of the CPU, and whatever is asked of them is computed there. What CUDA
would refuse, a tensor of the host beside one of the device, is refused here, so that a run finds where code
forgets to move something. It is PyTorch's `PrivateUse1` device, which a process keeps once it has it: tests
that use it run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_setup_privateuseone_for_python_backend(NAME)
HOST, DEVICE = torch.device("cpu"), torch.device(NAME, 0)
aten = torch.ops.aten

_MOVES = {aten.copy_.default, aten._to_copy.default, aten._local_scalar_dense.default}
"""Operations between the two."""
_TAKES_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
"""On the device these take indices of the host too, as on CUDA."""


class Elsewhere(Tensor):
    """A tensor on the device.

    Attributes:
        raw: its numbers.
    """

    raw: Tensor

    @staticmethod
    def __new__(cls, raw):
        return Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self, **_):
        return f"Elsewhere({self.raw!r})"

    def __tensor_flatten__(self):
        return ["raw"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["raw"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        return self.raw.tolist()

    @property
    def data(self):
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        Tensor.data.__set__(self, value)
        self.raw = value.raw


class OnDevice(TorchDispatchMode):
    """While it lasts, tensors can be made on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten._fused_sdp_choice.default:
        return 0  # attention written out
    tensors = [t for t in tree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    _refuse_mixtures(func, args, tensors)
    there = any(isinstance(t, Elsewhere) for t in tensors)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": HOST, **({"pin_memory": None} if "pin_memory" in kwargs else {})}
    elif func is aten.copy_.default or func in _TAKES_INDICES:
        there = isinstance(args[0], Elsewhere)
    raw_args, raw_kwargs = tree.tree_map_only(Tensor, _raw, (args, kwargs))
    if func is aten.histc.default:  # for whole numbers on GPUs only
        result = func(raw_args[0].float(), *raw_args[1:], **raw_kwargs).to(raw_args[0].dtype)
    else:
        result = func(*raw_args, **raw_kwargs)
    if func is aten._to_copy.default and result is raw_args[0]:
        result = result.clone()
    if not there:
        return result
    owners = {id(t.raw): t for t in tensors if isinstance(t, Elsewhere)}
    wrapped = tree.tree_map_only(Tensor, lambda t: owners[id(t)] if id(t) in owners else Elsewhere(t), result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _refuse_mixtures(func: Callable[..., Any], args: Any, tensors: list[Tensor]) -> None:
    inside = [t for t in tensors if isinstance(t, Elsewhere)]
    outside = [t for t in tensors if not isinstance(t, Elsewhere)]
    if not inside or not outside or func in _MOVES:
        return
    if func in _TAKES_INDICES:
        if isinstance(args[0], Elsewhere):
            return
    elif all(t.dim() == 0 for t in outside) and func not in (aten.cat.default, aten.stack.default):
        return
    shapes = [(t.device.type, tuple(t.shape)) for t in tensors]
    raise RuntimeError(f"expected all tensors to be on the same device: {func} got {shapes}")


def _raw(tensor: Tensor) -> Tensor:
    return tensor.raw if isinstance(tensor, Elsewhere) else tensor


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Elsewhere(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    _raw(target).copy_(_raw(source))
    return target


def _silu_backward(grad, x):
    """Of a device without a kernel of its own PyTorch writes this gradient out, with other last bits."""
    return Elsewhere(aten.silu_backward.default(_raw(grad), _raw(x)))


_LIBRARY = torch.library.Library("aten", "IMPL")  # kept: it owns what PyTorch's own C++ asks for
for _name, _function in (
    ("empty.memory_format", _empty),
    ("empty_strided", _empty_strided),
    ("_copy_from", _copy_from),
    ("silu_backward", _silu_backward),
):
    _LIBRARY.impl(_name, _function, "PrivateUse1")
