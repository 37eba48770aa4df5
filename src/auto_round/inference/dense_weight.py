"""The weight of a quantized layer as a tensor that is dequantized when its numbers are needed.

Code around a linear layer reads its `weight`: dtype and device (PEFT, T5), the whole matrix (an absorbed
projection of latent attention, DoRA), or it hands it to an initialisation that skips what was loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from auto_round.errors import Refusal, UnsupportedError

_ASSIGNMENTS = (Tensor.data.__set__, Tensor.__setitem__)  # type: ignore[attr-defined]


class DenseWeight(Tensor):
    """A matrix that is made for each operation on it; asking for its shape, dtype or device makes nothing.

    It cannot be changed: the layer keeps codes and steps.
    """

    _make: Callable[[], Tensor]
    _is_hf_initialized: bool

    @staticmethod
    def __new__(
        cls: type[DenseWeight],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], Tensor],
    ) -> DenseWeight:
        """Stand for the matrix that `make` returns."""
        weight = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        weight._make = make
        weight._is_hf_initialized = True  # Transformers' mark: its initialisation leaves the tensor alone
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse `weight.data = ...` and `weight[...] = ...`, which would be lost without a word."""
        if func in _ASSIGNMENTS:
            raise _unchangeable()
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation on the dequantized matrix."""
        if func is torch.ops.aten.detach.default:
            return args[0]._again()
        if func._schema.is_mutable and any(
            isinstance(value, DenseWeight)
            for declared, value in zip(func._schema.arguments, args, strict=False)
            if declared.alias_info is not None and declared.alias_info.is_write
        ):
            raise _unchangeable()
        real = tree_map_only(DenseWeight, lambda weight: weight._make(), (tuple(args), dict(kwargs or {})))
        return func(*real[0], **real[1])

    def _again(self) -> DenseWeight:
        return DenseWeight(self.shape, self.dtype, self.device, self._make)

    def __repr__(self) -> str:  # type: ignore[override]
        """Shape and dtype: printing numbers would dequantize them."""
        return f"DenseWeight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles hold the numbers."""
        return self._make().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _unchangeable() -> UnsupportedError:
    return UnsupportedError(
        "the weight of a quantized layer cannot be changed in place",
        [
            Refusal(
                "auto_round",
                "it is kept as codes and steps",
                "call model.dequantize() first, for example before adapters are merged",
            )
        ],
    )
