"""compressed-tensors order: whole numbers packed along the input, or one `int8` each.

Tensors, with `out`, `in`, `n_groups` and `bits` of the weight; scales lie in the format's scale dtype.

`pack-quantized`:

* `weight_packed` `[out, ceil(in * bits / 32)]` int32, first input in the lowest bits. Codes are unsigned (the
  number plus `2**(bits-1)`) and dense: 32 codes fill `bits` words, those of 3, 5, 6 and 7 bits run across;
* `weight_scale` `[out, n_groups]`;
* `weight_shape` `[2]` int64, `out` and `in`;
* `weight_zero_point` `[ceil(out * bits / 32), n_groups]` int32, asymmetric formats only: zero points as
  codes, packed along the output.

`int-quantized`: `weight` `[out, in]` int8 with the numbers themselves, and `weight_scale`.

Source: compressed-tensors 0.20, `compressors/pack_quantized/base.py` and `helpers.py`,
`compressors/naive_quantized/base.py`. Releases until the middle of 2026 put `32 // bits` codes into a word,
which is another order for 3, 5, 6 and 7 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import CheckpointError, Refusal
from auto_round.facts.compressed import BYTES, WORDS
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts import integers
from auto_round.layouts.bits import WIDTHS, WORD, pack_bits, unpack_bits
from auto_round.layouts.layout import Layout
from auto_round.numerics.format import Format
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.qtensor import QTensor

OCTET = 8
LAYOUT_VERSION = "0.20.0"
"""Release of compressed-tensors whose order of bytes this is."""


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """Codes in dense words.

    Attributes:
        name: name of the layout, the `format` of a configuration.
    """

    name: str = WORDS

    def accepts(self, fmt: Format, shape: Sequence[int]) -> Refusal | None:
        """None for whole-number formats of 2 to 8 bits whose groups divide the rows."""
        return _refuse(self.name, fmt, shape)

    def spec(self, fmt: Format, shape: Sequence[int]) -> Mapping[str, TensorSpec]:
        """`weight_packed`, `weight_scale`, `weight_shape`, and `weight_zero_point` of asymmetric formats."""
        n_out, n_in = shape
        bits, n_groups = fmt.grid.bits, fmt.group.count(n_in)
        specs = {
            "weight_packed": TensorSpec(torch.int32, (n_out, _words(n_in, bits))),
            "weight_scale": TensorSpec(integers.step_dtype(fmt), (n_out, n_groups)),
            "weight_shape": TensorSpec(torch.int64, (2,)),
        }
        if not integers.is_symmetric(fmt):
            specs["weight_zero_point"] = TensorSpec(torch.int32, (_words(n_out, bits), n_groups))
        return specs

    def pack(self, q: QTensor) -> Mapping[str, Tensor]:
        """Stored tensors of a quantized weight."""
        bits = q.format.grid.bits
        parts = {
            "weight_packed": _pack(q.codes, bits),
            "weight_scale": q.scale.parts["step"].contiguous(),
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64, device="cpu"),
        }
        if not integers.is_symmetric(q.format):
            parts["weight_zero_point"] = _pack(q.scale.parts["zero"].t(), bits).t().contiguous()
        return parts

    def unpack(self, parts: Mapping[str, Tensor], fmt: Format, shape: Sequence[int]) -> QTensor:
        """Inverse of `pack`.

        Raises:
            CheckpointError: tensors that `pack` would not have written.
        """
        integers.check_parts(self.name, parts, self.spec(fmt, shape))
        if parts["weight_shape"].tolist() != list(shape):
            raise CheckpointError(
                f"{self.name}: weight_shape is {parts['weight_shape'].tolist()}, expected {list(shape)}"
            )
        bits = fmt.grid.bits
        read = {"step": parts["weight_scale"]}
        if not integers.is_symmetric(fmt):
            read["zero"] = _unpack(parts["weight_zero_point"].t(), bits, shape[0]).t().contiguous()
        return QTensor(_unpack(parts["weight_packed"], bits, shape[1]), fmt.rule.read(read), fmt)


@dataclass(frozen=True, slots=True)
class IntQuantized:
    """Numbers as they are, a byte each; symmetric formats only.

    Attributes:
        name: name of the layout, the `format` of a configuration.
    """

    name: str = BYTES

    def holds(self, fmt: Format) -> bool:
        """Whether a format has numbers that fill their bytes, and nothing but a step, sizes aside."""
        return (
            isinstance(fmt.grid, IntGrid)
            and fmt.grid.bits == OCTET
            and list(fmt.rule.stored) == ["step"]
            and integers.is_symmetric(fmt)
        )

    def accepts(self, fmt: Format, shape: Sequence[int]) -> Refusal | None:
        """None for symmetric whole-number formats of 2 to 8 bits whose groups divide the rows."""
        refusal = _refuse(self.name, fmt, shape)
        if refusal is None and not integers.is_symmetric(fmt):
            return Refusal(self.name, "has no zero points of weights", "use symmetric weights")
        return refusal

    def spec(self, fmt: Format, shape: Sequence[int]) -> Mapping[str, TensorSpec]:
        """`weight` and `weight_scale`."""
        n_out, n_in = shape
        return {
            "weight": TensorSpec(torch.int8, (n_out, n_in)),
            "weight_scale": TensorSpec(integers.step_dtype(fmt), (n_out, fmt.group.count(n_in))),
        }

    def pack(self, q: QTensor) -> Mapping[str, Tensor]:
        """Stored tensors of a quantized weight."""
        return {
            # uint8 wraps around, which is what two's complement does
            "weight": (q.codes - (1 << (q.format.grid.bits - 1))).view(torch.int8).contiguous(),
            "weight_scale": q.scale.parts["step"].contiguous(),
        }

    def unpack(self, parts: Mapping[str, Tensor], fmt: Format, shape: Sequence[int]) -> QTensor:
        """Inverse of `pack`.

        Raises:
            CheckpointError: tensors that `pack` would not have written.
        """
        integers.check_parts(self.name, parts, self.spec(fmt, shape))
        half = 1 << (fmt.grid.bits - 1)
        outside = int(((parts["weight"] < -half) | (parts["weight"] > half - 1)).sum())
        if outside:
            raise CheckpointError(
                f"{self.name}: {outside} numbers of weight lie outside of the {fmt.grid.bits} bits "
                f"{-half} ... {half - 1}"
            )
        codes = parts["weight"].view(torch.uint8) + half
        return QTensor(codes, fmt.rule.read({"step": parts["weight_scale"]}), fmt)


PACK_QUANTIZED = PackQuantized()
"""Weight-only whole numbers."""

INT_QUANTIZED = IntQuantized()
"""Whole numbers whose layer has quantized activations too."""

INTEGERS: dict[str, Layout] = {layout.name: layout for layout in (PACK_QUANTIZED, INT_QUANTIZED)}
"""Layouts of whole numbers by the `format` of a compressed-tensors configuration."""


def _refuse(who: str, fmt: Format, shape: Sequence[int]) -> Refusal | None:
    refusal = integers.refuse(who, fmt, shape, WIDTHS)
    if refusal is None and shape[1] % fmt.group.width(shape[1]):
        return Refusal(
            who,
            f"needs full groups: {fmt.group.size} does not divide {shape[1]} inputs",
            "use another group_size",
        )
    return refusal


def _words(n_codes: int, bits: int) -> int:
    """Words of `n_codes` codes, the last one filled up with zeros."""
    return -(-n_codes * bits // WORD)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """`pack_bits` along the last axis for any number of codes."""
    n = codes.shape[-1]
    filled = torch.nn.functional.pad(codes, (0, -n % WORD)) if n % WORD else codes
    return pack_bits(filled, bits)[..., : _words(n, bits)].contiguous()


def _unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `_pack` for `n` codes."""
    missing = -(-n // WORD) * bits - packed.shape[-1]
    filled = torch.nn.functional.pad(packed, (0, missing)) if missing else packed
    return unpack_bits(filled, bits)[..., :n].contiguous()
