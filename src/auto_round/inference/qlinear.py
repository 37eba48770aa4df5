"""QuantLinear: a linear layer whose weight is loaded as it lies on disk and kept as its kernel wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from auto_round.errors import CheckpointError, InternalError, UnsupportedError
from auto_round.inference.dense_weight import DenseWeight
from auto_round.kernels.kernel import INPUT, Kernel, LinearSpec
from auto_round.kernels.select import AUTO, select_kernel
from auto_round.layouts.gptq import GPTQ
from auto_round.layouts.layer import LayerLayout
from auto_round.layouts.layout import Layout
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor, QuantizedLayer

ORDER = "g_idx"
"""Tensor of GPTQ checkpoints with the group of each input, which some of them leave out."""


WEIGHT = "weight"
"""Tensor of checkpoints whose codes have a dtype of their own."""


def named(layer: str, error: UnsupportedError) -> UnsupportedError:
    """The same error with the layer's name in front."""
    return UnsupportedError(f'layer "{layer}": {str(error).splitlines()[0]}', error.refusals)


_SIXTEEN = (torch.float16, torch.bfloat16)


class PackedWeight(nn.Module):
    """The tensors of one weight as a layout stores them, on the meta device until a checkpoint fills them.

    Attributes:
        stored: how its bytes lie.
    """

    def __init__(self, stored: LayerLayout) -> None:
        nn.Module.__init__(self)  # a subclass is a linear layer too, whose weight is not to be made
        self.stored = stored
        for suffix, spec in stored.spec().items():
            # Not `register_buffer`: FP8 codes are stored as `weight`, which `QuantLinear` has as a property.
            self._buffers[suffix] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    @property
    def fmt(self) -> Format:
        """Numeric format of the weight."""
        return self.stored.format

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by suffix."""
        return {suffix: self.get_buffer(suffix) for suffix in self.stored.spec()}

    @property
    def ordered(self) -> bool:
        """Whether the stored tensors have a `g_idx`."""
        order = self.stored.weight
        return isinstance(order, GPTQ) and order.indexed

    def drop_order(self) -> None:
        """Expect the tensors without `g_idx`."""
        order = self.stored.weight
        if isinstance(order, GPTQ):
            self.stored = self.stored.with_weight(replace(order, indexed=False))
            del self._buffers[ORDER]

    def unpack(self) -> QuantizedLayer:
        """The quantized weight, and the number of its input where there is one.

        Raises:
            UnsupportedError: the tensors were left on disk or were never loaded.
            CheckpointError: tensors that the layout would not have written.
        """
        parts = self.parts()
        if any(part.is_meta for part in parts.values()):
            raise UnsupportedError(
                "a quantized layer has no weights in memory; give a device_map that leaves no layer on disk"
            )
        return self._read(parts)

    def _read(self, parts: Mapping[str, Tensor]) -> QuantizedLayer:
        wanted = self.stored.spec()
        narrow = {name: _narrowed(part, wanted[name].dtype) for name, part in parts.items()}
        return self.stored.unpack(narrow)


def _narrowed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored float as it was stored, where that loses nothing.

    Transformers widens tensors while it loads them whose names hold a word of the model's
    `_keep_in_fp32_modules_strict`, and `scale` is in some models' list. diffusers casts every floating tensor
    to the dtype that a model is loaded in, so that the other kind of 16 bits may arrive here.
    """
    if part.dtype in _SIXTEEN and dtype in _SIXTEEN:
        return part.to(dtype)
    if part.dtype in _SIXTEEN and dtype is torch.float32:
        return _widened(part)
    if part.dtype is dtype or not (part.dtype is torch.float32 and dtype.is_floating_point):
        return part
    stored = part.to(dtype)
    return stored if torch.equal(stored.to(part.dtype), part) else part


def _widened(part: Tensor) -> Tensor:
    """Steps that diffusers has cast: in bfloat16 up to 1/512 of them is lost.

    Raises:
        UnsupportedError: it has left the range of the dtype.
    """
    if not torch.isfinite(part).all():
        raise UnsupportedError(
            f"steps of a quantized layer do not fit into {part.dtype}: load the model as torch.bfloat16"
        )
    return part.float()


class QuantLinear(PackedWeight, nn.Linear):
    """A linear layer `[..., in] -> [..., out]` with a quantized weight.

    It is born with the tensors of the checkpoint; `adopt` replaces them by the kernel's. The state dict
    always holds the checkpoint's tensors, so that a loaded model can be saved again without a changed byte.
    It is an `nn.Linear` to those who look for linear layers, PEFT among them; its weight is no parameter.

    Attributes:
        in_features: inputs.
        out_features: outputs.
        spec: the layer as its kernel sees it.
        kernel: what multiplies.
        backend: name by which kernels are chosen when the layer is moved.
        bias: `[out]` or None.
        adopted: whether the kernel has taken over.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]  # as in PyTorch, where it may be None too

    def __init__(
        self,
        spec: LinearSpec,
        layout: Layout,
        kernel: Kernel,
        bias: nn.Parameter | None,
        backend: str = AUTO,
    ) -> None:
        super().__init__(LayerLayout(layout, spec.fmt, spec.shape, spec.inputs))
        self.out_features, self.in_features = spec.shape
        self.spec = spec
        self.kernel = kernel
        self.backend = backend
        self.adopted = False
        self.register_parameter("bias", bias)

    @property
    def bits(self) -> int:
        """Bits of a code, scales not counted."""
        return self.spec.fmt.grid.bits

    @property
    def group_size(self) -> int:
        """Weights that share a scale; -1 one group for each row, 0 one for the whole matrix."""
        return self.spec.fmt.group.size

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`[out, in]` in the dtype of the layer, dequantized when an operation needs its numbers.

        Where a checkpoint stores codes under this name, these are what there is until the kernel takes over.
        """
        if not self.adopted and WEIGHT in self._buffers:
            return self._kernel_buffers()[WEIGHT]
        device = next(iter(self._tensors())).device
        return DenseWeight(self.spec.shape, self.spec.dtype, device, self.dequantize)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[out, in]` in a dtype, that of the layer when none is given."""
        dtype = dtype or self.spec.dtype
        if not self.adopted and any(part.is_meta for part in self.parts().values()):
            return torch.empty(self.spec.shape, dtype=dtype, device="meta")
        q = self.restore().weight
        return q.format.dequantize(q, self.spec.held or dtype).to(dtype)

    def adopt(self, kernel: Kernel, spec: LinearSpec) -> None:
        """Hand the loaded tensors to a kernel and keep only what it needs.

        Raises:
            UnsupportedError: the tensors were left on disk or were never loaded.
            CheckpointError: tensors that the layout would not have written.
        """
        if not self.adopted:
            self._hand_over(self.unpack(), kernel, spec)

    def change_kernel(self, kernel: Kernel, spec: LinearSpec) -> None:
        """Let another kernel take over from the one that runs the layer now; the weight stays bit for bit."""
        self._hand_over(self.restore(), kernel, spec)

    def restore(self) -> QuantizedLayer:
        """The quantized weight and the number of its input, bit for bit as they were loaded."""
        if not self.adopted:
            return self.unpack()
        buffers = self._kernel_buffers()
        return QuantizedLayer(self.kernel.restore(buffers, self.spec), buffers.get(INPUT))

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias` in the dtype of `x`."""
        if not self.adopted:
            raise InternalError("a quantized layer was used before post_init prepared it")
        if x.dtype != self.spec.dtype:  # under autocast, or behind a norm that is kept in float32
            return self.forward(x.to(self.spec.dtype)).to(x.dtype)
        if torch.is_grad_enabled() and (
            x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        ):
            y: Tensor = _Product.apply(x, self.bias, self)  # type: ignore[no-untyped-call]
            return y
        return self.kernel.linear(x, self._kernel_buffers(), self.spec, self.bias)

    def _hand_over(self, layer: QuantizedLayer, kernel: Kernel, spec: LinearSpec) -> None:
        buffers = _buffers(layer, kernel, spec)
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.kernel, self.spec, self.adopted = kernel, spec, True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """What `model.to(...)`, `.cuda()` and the like call: dtypes of a kernel's buffers never change.

        Where the layer gets another dtype or another kind of device, its kernel is chosen anew.

        Raises:
            UnsupportedError: no kernel of the backend runs with that dtype or on that device.
        """
        if not self.adopted:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        before = next(iter(self._tensors())).device
        wanted = fn(torch.empty(0, dtype=self.spec.dtype, device=before))
        spec = replace(self.spec, dtype=wanted.dtype)
        if wanted.device.type not in (before.type, "meta"):
            spec = replace(spec, device=wanted.device.type)
        kernel = self.kernel if spec == self.spec else self._kernel_for(spec, wanted.device)
        if kernel != self.kernel:
            self._hand_over(_moved(self.restore(), wanted.device), kernel, spec)
        moved = {name: _kept(buffer, fn(buffer)) for name, buffer in self._kernel_buffers().items()}
        self._buffers.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(moved)
        self.spec = spec
        return self

    def _kernel_for(self, spec: LinearSpec, device: torch.device) -> Kernel:
        try:
            return select_kernel(spec, self.backend)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"a loaded quantized layer cannot become {spec.dtype} on {device}; give `dtype`, "
                "`device_map` or another backend to `from_pretrained` instead",
                error.refusals,
            ) from error

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, format={self.fmt.name}, kernel={self.kernel.name}"

    def _kernel_buffers(self) -> Mapping[str, Tensor]:
        return self._buffers  # type: ignore[return-value]  # none of a kernel's buffers is None

    def _tensors(self) -> Iterable[Tensor]:
        return self._kernel_buffers().values()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.adopted:
            for suffix, part in self.stored.pack(self.restore()).items():
                destination[prefix + suffix] = part

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        *reports: list[str],
    ) -> None:
        """What `load_state_dict` calls: takes the tensors of a checkpoint, as `state_dict` gives them."""
        if not self.adopted:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
            return
        wanted = self.stored.spec()
        parts = {suffix: state_dict[prefix + suffix] for suffix in wanted if prefix + suffix in state_dict}
        others = {name: t for name, t in state_dict.items() if name.removeprefix(prefix) not in parts}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, *reports)
        missing, _, errors = reports
        missing.extend(prefix + suffix for suffix in wanted if suffix not in parts)
        if len(parts) == len(wanted):
            try:
                self._take(parts)
            except (CheckpointError, UnsupportedError) as error:
                errors.append(f"{prefix.removesuffix('.')}: {error}")

    def _take(self, parts: Mapping[str, Tensor]) -> None:
        """Fill the kernel's buffers from stored tensors."""
        device = next(iter(self._tensors())).device
        here = {suffix: part.detach().to(device) for suffix, part in parts.items()}
        made = _buffers(self._read(here), self.kernel, self.spec)
        for name, buffer in self._kernel_buffers().items():
            buffer.copy_(made[name])


class _Product(torch.autograd.Function):
    """`x W^T + bias` by a layer's kernel, with gradients for `x` and the bias.

    Kernels know no gradients, and PyTorch's would keep every dequantized weight until the backward pass; here
    it is made again when it is needed. The gradient of `x` is the exact one of the dequantized weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.kernel.linear(x, layer._kernel_buffers(), layer.spec, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_x, to_bias, _ = ctx.needs_input_grad
        return (
            grad @ ctx.layer.dequantize(grad.dtype) if to_x else None,
            grad.flatten(0, -2).sum(0) if to_bias else None,
            None,
        )


def _kept(buffer: Tensor, changed: Tensor) -> Tensor:
    """`changed`, or where its dtype is another, the buffer on the same device."""
    return changed if changed.dtype == buffer.dtype else buffer.to(changed.device)


def _buffers(layer: QuantizedLayer, kernel: Kernel, spec: LinearSpec) -> dict[str, Tensor]:
    """What a kernel needs of a layer."""
    number = {} if layer.input_scale is None else {INPUT: layer.input_scale}
    return {**kernel.prepare(layer.weight, spec), **number}


def _moved(layer: QuantizedLayer, device: torch.device) -> QuantizedLayer:
    """The same layer on another device."""
    q, number = layer.weight, layer.input_scale
    parts = {name: part.to(device) for name, part in q.scale.parts.items()}
    moved = QTensor(q.codes.to(device), q.format.rule.read(parts), q.format)
    return QuantizedLayer(moved, None if number is None else number.to(device))
