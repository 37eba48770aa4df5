"""AWQ order ("GEMM"): codes and zero points packed along the output, eight 4-bit codes a word, interleaved.

Tensors, with `out`, `in` and `n_groups` of the weight:

* `qweight` `[in, out / 8]` int32;
* `qzeros` `[n_groups, out / 8]` int32, zero points as they are;
* `scales` `[n_groups, out]` in the format's scale dtype.

From low to high the nibbles of a word hold outputs 0, 2, 4, 6, 1, 3, 5, 7. Source: AutoAWQ 0.2
`modules/linear/gemm.py`, `order_map`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts import integers
from auto_round.layouts.bits import BAND
from auto_round.numerics.at_once import bands
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor

BITS = 4
PER_WORD = 8

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output (of eight) that lies in each nibble of a word, low to high."""


@dataclass(frozen=True, slots=True)
class AWQ:
    """AWQ order of words; 4 bits only.

    Attributes:
        name: name of the layout.
    """

    name: str = "awq"

    def accepts(self, fmt: Format, shape: Sequence[int]) -> Refusal | None:
        """None for 4-bit whole-number formats whose groups are all full and whose outputs fill words."""
        refusal = integers.refuse(self.name, fmt, shape, (BITS,))
        if refusal is not None:
            return refusal
        n_out, n_in = shape
        if n_out % PER_WORD:
            return Refusal(self.name, f"needs a multiple of {PER_WORD} outputs, not {n_out}")
        if n_in % fmt.group.width(n_in):
            return Refusal(self.name, f"needs full groups: {n_in} inputs, group_size {fmt.group.size}")
        return None

    def spec(self, fmt: Format, shape: Sequence[int]) -> Mapping[str, TensorSpec]:
        """`qweight`, `qzeros` and `scales`."""
        n_out, n_in = shape
        n_groups = fmt.group.count(n_in)
        return {
            "qweight": TensorSpec(torch.int32, (n_in, n_out // PER_WORD)),
            "qzeros": TensorSpec(torch.int32, (n_groups, n_out // PER_WORD)),
            "scales": TensorSpec(integers.step_dtype(fmt), (n_groups, n_out)),
        }

    def pack(self, q: QTensor) -> Mapping[str, Tensor]:
        """Stored tensors of a quantized weight."""
        return {
            "qweight": _pack(q.codes),
            "qzeros": _pack(integers.stored_zero(q)),
            "scales": q.scale.parts["step"].t().contiguous(),
        }

    def unpack(self, parts: Mapping[str, Tensor], fmt: Format, shape: Sequence[int]) -> QTensor:
        """Inverse of `pack`.

        Raises:
            CheckpointError: tensors that `pack` would not have written.
        """
        integers.check_parts(self.name, parts, self.spec(fmt, shape))
        codes, zero = _unpack(parts["qweight"]), _unpack(parts["qzeros"])
        return integers.assemble(self.name, codes, parts["scales"].t().contiguous(), zero, fmt)


def _pack(codes: Tensor) -> Tensor:
    """`[out, n]` uint8 -> `[n, out / 8]` int32."""
    octets = codes.reshape(-1, PER_WORD, codes.shape[1])
    words = torch.zeros(len(octets), codes.shape[1], dtype=torch.int32, device=codes.device)
    for band in _bands(octets):
        into, part = words[band], octets[band]
        for nibble, output in enumerate(ORDER):
            into |= part[:, output].to(torch.int32).bitwise_left_shift_(BITS * nibble)
    return words.t().contiguous()


def _unpack(words: Tensor) -> Tensor:
    """Inverse of `_pack`."""
    rows = words.t().contiguous()
    octets = torch.empty(len(rows), PER_WORD, rows.shape[1], dtype=torch.uint8, device=words.device)
    for band in _bands(octets):
        into, part = octets[band], rows[band]
        for nibble, output in enumerate(ORDER):
            into[:, output] = (part >> (BITS * nibble)).bitwise_and_((1 << BITS) - 1)
    return octets.flatten(0, 1)


def _bands(octets: Tensor) -> Iterator[slice]:
    """Rows `[8, n]` to handle at a time, so that temporaries stay in a core's cache."""
    return bands(len(octets), PER_WORD * octets.shape[2], BAND)
