"""QuantLinear: a linear layer whose weight is loaded as it lies on disk and kept as its kernel wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import InternalError, UnsupportedError
from auto_round.kernels.kernel import Kernel, LinearSpec
from auto_round.layouts.gptq import GPTQ
from auto_round.layouts.layout import Layout
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor

ORDER = "g_idx"
"""Tensor of GPTQ checkpoints with the group of each input, which some of them leave out."""


def named(layer: str, error: UnsupportedError) -> UnsupportedError:
    """The same error with the layer's name in front."""
    return UnsupportedError(f'layer "{layer}": {str(error).splitlines()[0]}', error.refusals)


class PackedWeight(nn.Module):
    """The tensors of one weight as a layout stores them, on the meta device until a checkpoint fills them.

    Attributes:
        fmt: numeric format of the weight.
        layout: order of the stored bytes.
        shape: `(out, in)`.
    """

    def __init__(self, fmt: Format, layout: Layout, shape: tuple[int, int]) -> None:
        super().__init__()
        self.fmt = fmt
        self.layout = layout
        self.shape = shape
        for suffix, spec in layout.spec(fmt, shape).items():
            self.register_buffer(suffix, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by suffix."""
        return {suffix: self.get_buffer(suffix) for suffix in self.layout.spec(self.fmt, self.shape)}

    @property
    def ordered(self) -> bool:
        """Whether the stored tensors have a `g_idx`."""
        return isinstance(self.layout, GPTQ) and self.layout.indexed

    def drop_order(self) -> None:
        """Expect the tensors without `g_idx`."""
        if isinstance(self.layout, GPTQ):
            self.layout = replace(self.layout, indexed=False)
            del self._buffers[ORDER]

    def unpack(self) -> QTensor:
        """The quantized weight.

        Raises:
            UnsupportedError: the tensors were left on disk or were never loaded.
            CheckpointError: tensors that the layout would not have written.
        """
        parts = self.parts()
        if any(part.is_meta for part in parts.values()):
            raise UnsupportedError(
                "a quantized layer has no weights in memory; give a device_map that leaves no layer on disk"
            )
        return self.layout.unpack(parts, self.fmt, self.shape)


class QuantLinear(PackedWeight):
    """A linear layer `[..., in] -> [..., out]` with a quantized weight.

    It is born with the tensors of the checkpoint; `adopt` replaces them by the kernel's. The state dict
    always holds the checkpoint's tensors, so that a loaded model can be saved again without a changed byte.

    Attributes:
        in_features: inputs.
        out_features: outputs.
        spec: the layer as its kernel sees it.
        kernel: what multiplies.
        bias: `[out]` or None.
        adopted: whether the kernel has taken over.
    """

    bias: nn.Parameter | None

    def __init__(self, spec: LinearSpec, layout: Layout, kernel: Kernel, bias: nn.Parameter | None) -> None:
        super().__init__(spec.fmt, layout, spec.shape)
        self.out_features, self.in_features = spec.shape
        self.spec = spec
        self.kernel = kernel
        self.adopted = False
        self.register_parameter("bias", bias)

    def adopt(self, kernel: Kernel, spec: LinearSpec) -> None:
        """Hand the loaded tensors to a kernel and keep only what it needs.

        Raises:
            UnsupportedError: the tensors were left on disk or were never loaded.
            CheckpointError: tensors that the layout would not have written.
        """
        if self.adopted:
            return
        buffers = kernel.prepare(self.unpack(), spec)
        for suffix in self.parts():
            del self._buffers[suffix]
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.kernel, self.spec, self.adopted = kernel, spec, True

    def change_kernel(self, kernel: Kernel, spec: LinearSpec) -> None:
        """Let another kernel take over from the one that runs the layer now; the weight stays bit for bit."""
        buffers = kernel.prepare(self.restore(), spec)
        for name in list(self._kernel_buffers()):
            del self._buffers[name]
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.kernel, self.spec = kernel, spec

    def restore(self) -> QTensor:
        """The quantized weight, bit for bit as it was loaded."""
        return self.kernel.restore(self._kernel_buffers(), self.spec) if self.adopted else self.unpack()

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias` in the dtype of `x`."""
        if not self.adopted:
            raise InternalError("a quantized layer was used before post_init prepared it")
        return self.kernel.linear(x, self._kernel_buffers(), self.spec, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """What `model.to(...)`, `.half()` and the like call: dtypes of a kernel's buffers never change.

        Raises:
            UnsupportedError: the kernel does not run with that dtype or on that device.
        """
        if not self.adopted:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        before = next(iter(self._kernel_buffers().values())).device
        wanted = fn(torch.empty(0, dtype=self.spec.dtype, device=before))
        spec = replace(self.spec, dtype=wanted.dtype)
        if wanted.device.type not in (before.type, "meta"):
            spec = replace(spec, device=wanted.device.type)
        refusal = None if spec == self.spec else self.kernel.refuses(spec)
        if refusal is not None:
            raise UnsupportedError(
                f"a loaded quantized layer cannot become {wanted.dtype} on {wanted.device}; give `dtype` and "
                "`device_map` to `from_pretrained` instead",
                [refusal],
            )
        moved = {name: _kept(buffer, fn(buffer)) for name, buffer in self._kernel_buffers().items()}
        self._buffers.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(moved)
        self.spec = spec
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, format={self.fmt.name}, kernel={self.kernel.name}"

    def _kernel_buffers(self) -> Mapping[str, Tensor]:
        return self._buffers  # type: ignore[return-value]  # none of a kernel's buffers is None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.adopted:
            for suffix, part in self.layout.pack(self.restore()).items():
                destination[prefix + suffix] = part


def _kept(buffer: Tensor, changed: Tensor) -> Tensor:
    """`changed`, or where its dtype is another, the buffer on the same device."""
    return changed if changed.dtype == buffer.dtype else buffer.to(changed.device)
