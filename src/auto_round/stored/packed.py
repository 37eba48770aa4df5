"""One packed weight of a folder: which tensors it lies in, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError, Refusal, UnsupportedError
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.by_numbers import ByNumbers
from auto_round.layouts.compressed_float import FloatLayout
from auto_round.layouts.layer import LayerLayout
from auto_round.layouts.layout import Layout
from auto_round.numerics.at_once import bands
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.schemes.scheme import QuantizationScheme

BAND = 1 << 19
"""Weights unpacked at a time where rows lie one after another."""
_OCTETS = (torch.uint8, torch.float8_e8m0fnu)
"""Dtypes under which the bytes of powers of two are stored."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight that lies on disk as codes and scales.

    Attributes:
        tensor: name of the plain tensor that it stands for.
        shape: `(out, in)`, of each matrix where it is a stack.
        format: what the codes mean.
        layout: order of the stored bytes.
        parts: part of the layout -> tensor on disk.
        stack: number of matrices; None for one that is no stack.
        transposed: the plain tensor has inputs before outputs.
        order: tensor that says which group each input belongs to, where the checkpoint has one.
        scheme: the format in words; None where there are none.
    """

    tensor: str
    shape: tuple[int, int]
    format: Format
    layout: Layout
    parts: Mapping[str, str] = field(hash=False)
    stack: int | None = None
    transposed: bool = False
    order: str | None = None
    scheme: QuantizationScheme | None = None

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """Shape of the plain tensor."""
        matrix = self.shape[::-1] if self.transposed else self.shape
        return matrix if self.stack is None else (self.stack, *matrix)

    @property
    def layer(self) -> str:
        """Name of the layer: that of the tensor without its last component."""
        return self.tensor.rpartition(".")[0]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Its tensors on disk."""
        return (*self.parts.values(), *([self.order] if self.order is not None else []))

    def mistake(self, files: Checkpoint) -> str:
        """What is wrong with the headers of its tensors; empty where they fit.

        Args:
            files: the folder.
        """
        for suffix, want in self.layout.spec(self.format, self.shape).items():
            name = self.parts.get(suffix)
            if name is None or name not in files:
                return f"{self.layer} has no {suffix}"
            info = files.info(name)
            count = (self.stack or 1) * math.prod(want.shape)
            alike = info.dtype is want.dtype or (info.dtype in _OCTETS and want.dtype in _OCTETS)
            led = count == 1 or info.shape[:1] == (self.stack or want.shape[0],)
            if not alike or not led or math.prod(info.shape) != count:
                return f"{name} is {info.dtype} {list(info.shape)}, expected {want.dtype} {list(want.shape)}"
        return ""

    def read(self, files: Checkpoint) -> QuantizedLayer:
        """Codes and scales of a matrix that is no stack, inputs in their order, and the number of its input.

        Raises:
            CheckpointError: tensors that contradict the configuration, or the number is missing.
            UnsupportedError: inputs reordered by activation, or a stack.
        """
        if self.stack is not None:
            raise UnsupportedError(
                f'"{self.tensor}" is a stack of {self.stack} matrices',
                [Refusal("stored", "codes are taken from one matrix at a time")],
            )
        if self._reordered(files) is not None:
            raise UnsupportedError(
                f'layer "{self.layer}": its inputs are reordered by activation (desc_act)',
                [Refusal("stored", "g_idx is not i // group_size", "use a checkpoint with desc_act false")],
            )
        return QuantizedLayer(self._unpack(files, None), *self._input_numbers(files))

    def plain(self, files: Checkpoint, dtype: torch.dtype) -> Tensor:
        """The weight itself, of `plain_shape`, in fresh memory; one matrix at a time is unpacked.

        Raises:
            CheckpointError: tensors that contradict the configuration.
        """
        if self.stack is not None:
            stacked = torch.empty(self.plain_shape, dtype=dtype, device="cpu")
            for i, place in enumerate(stacked):
                place.copy_(self.plain_entry(files, i, dtype))
            return stacked
        order = self._reordered(files)
        if order is None and isinstance(self.layout, FloatLayout | ByNumbers):
            return self._turned(self._plain_by_rows(files, dtype)).contiguous()
        q = self._unpack(files, None)
        if order is None:
            return self._turned(self.format.dequantize(q, dtype)).contiguous()
        grouped = QTensor(q.codes[:, order], q.scale, q.format)
        weight = torch.empty(q.shape, dtype=dtype, device="cpu")
        weight[:, order] = self.format.dequantize(grouped, dtype)
        return weight

    def plain_entry(self, files: Checkpoint, index: int, dtype: torch.dtype) -> Tensor:
        """One entry of the first axis of the weight: of a stack one matrix, which alone is unpacked.

        Raises:
            CheckpointError: tensors that contradict the configuration.
        """
        if self.stack is None:
            return self.plain(files, dtype)[index]
        return self._turned(self.format.dequantize(self._unpack(files, index), dtype))

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def _plain_by_rows(self, files: Checkpoint, dtype: torch.dtype) -> Tensor:
        """The weight, some rows at a time: codes of a whole matrix would take half of its own memory."""
        n_out, n_in = self.shape
        weight = torch.empty(self.shape, dtype=dtype, device="cpu")
        whole = self.layout.spec(self.format, self.shape)
        for rows in bands(n_out, n_in, BAND, self.format.group.rows):
            shape = (rows.stop - rows.start, n_in)
            parts = {}
            for suffix, spec in self.layout.spec(self.format, shape).items():
                name = self.parts[suffix]
                if spec == whole[suffix]:
                    stored = files.read(name)
                else:
                    held = rows if whole[suffix].shape[0] == n_out else self.format.group.scale_rows(rows)
                    stored = files.read_rows(name, held.start, held.stop)
                parts[suffix] = _as_specified(stored, spec)
            weight[rows] = self.format.dequantize(self._of_parts(parts, shape), dtype)
        return weight

    def _unpack(self, files: Checkpoint, index: int | None) -> QTensor:
        wanted = self.layout.spec(self.format, self.shape)
        parts = {}
        for suffix, spec in wanted.items():
            name = self.parts[suffix]
            stored = files.read(name) if index is None else files.read_rows(name, index, index + 1)
            parts[suffix] = _as_specified(stored, spec)
        return self._of_parts(parts, self.shape)

    def _of_parts(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QTensor:
        try:
            return self.layout.unpack(parts, self.format, shape)
        except CheckpointError as error:
            raise CheckpointError(f'layer "{self.layer}": {error}') from error
        except UnsupportedError as error:
            raise UnsupportedError(f'layer "{self.layer}" cannot be unpacked', error.refusals) from error

    def _input_numbers(self, files: Checkpoint) -> list[Tensor]:
        """What calibration fixed for the input, `[1]` each."""
        inputs = None if self.scheme is None else self.scheme.activation_format()
        stored = LayerLayout(self.layout, self.format, self.shape, inputs)
        return [files.read(f"{self.layer}.{name}").reshape(1) for name in stored.input_spec()]

    def _reordered(self, files: Checkpoint) -> Tensor | None:
        """Inputs sorted by their groups, int64 `[in]`; None where they are in that order already.

        Raises:
            CheckpointError: groups of different sizes.
        """
        if self.order is None:
            return None
        group_of = files.read(self.order).to(torch.int64)
        width = self.format.group.width(self.shape[1])
        plain = torch.arange(self.shape[1], dtype=torch.int64, device="cpu") // width
        if torch.equal(group_of, plain):
            return None
        order = torch.argsort(group_of, stable=True)
        if group_of.shape != plain.shape or not torch.equal(group_of[order], plain):
            raise CheckpointError(f"{self.order}: its groups are not of {width} inputs each")
        return order


def _as_specified(stored: Tensor, spec: TensorSpec) -> Tensor:
    """The tensor under the dtype and shape that a layout wants, as far as bytes and count allow."""
    if stored.dtype is not spec.dtype and stored.dtype in _OCTETS and spec.dtype in _OCTETS:
        stored = stored.view(spec.dtype)
    return stored.reshape(spec.shape) if stored.numel() == math.prod(spec.shape) else stored
