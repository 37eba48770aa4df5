"""GPTQ order: codes packed along the input, zero points along the output.

Tensors, with `out`, `in`, `n_groups` and `bits` of the weight:

* `qweight` `[in * bits / 32, out]` int32, first input in the lowest bits;
* `qzeros` `[n_groups, out * bits / 32]` int32, first output in the lowest bits;
* `scales` `[n_groups, out]` in the format's scale dtype;
* `g_idx` `[in]` int32, the group of each input, where a layout has it.

Source: AutoGPTQ 0.7 `qlinear_cuda.py` (version 1, zero points stored minus one); GPTQModel's version 2 stores
them as they are.

A zero point of 0 has no place in version 1, and readers do not agree on what its wrapped bits mean: vLLM's
exllama kernels add one and get `2**bits` (`csrc/quantization/gptq/q_gemm.cu`, `zero_offset`), GPTQModel adds
one to whole words and the carry runs into the neighbour (`utils/model.py`,
`convert_gptq_v1_to_v2_format_module`), others mask. So such a group is stored mirrored: codes and zero point
counted from the other end, the step negative (`integers.mirrored`): the same weights to every reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts import integers
from auto_round.layouts.bits import WIDTHS, WORD, pack_bits, pack_columns, unpack_bits, words
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor


@dataclass(frozen=True, slots=True)
class GPTQ:
    """GPTQ order of words.

    Attributes:
        name: name of the layout.
        minus_one: zero points are stored minus one (version 1).
        indexed: the group of each input is stored too (`g_idx`).
        filled: a short last group is stored at full length; codes behind the row's end stand for 0.
    """

    name: str
    minus_one: bool
    indexed: bool = False
    filled: bool = False

    def accepts(self, fmt: Format, shape: Sequence[int]) -> Refusal | None:
        """None for whole-number formats of 2 to 8 bits with both dimensions multiples of 32."""
        refusal = integers.refuse(self.name, fmt, shape, WIDTHS)
        if refusal is None and any(n % WORD for n in shape):
            return Refusal(self.name, f"needs multiples of {WORD} in both dimensions, not {list(shape)}")
        return refusal

    def spec(self, fmt: Format, shape: Sequence[int]) -> Mapping[str, TensorSpec]:
        """`qweight`, `qzeros`, `scales` and, where groups are indexed, `g_idx`."""
        n_out, n_in = shape
        bits, n_groups = fmt.grid.bits, fmt.group.count(n_in)
        spec = {
            "qweight": TensorSpec(torch.int32, (words(self._length(fmt, n_in), bits), n_out)),
            "qzeros": TensorSpec(torch.int32, (n_groups, words(n_out, bits))),
            "scales": TensorSpec(integers.step_dtype(fmt), (n_groups, n_out)),
        }
        return {**spec, "g_idx": TensorSpec(torch.int32, (n_in,))} if self.indexed else spec

    def pack(self, q: QTensor) -> Mapping[str, Tensor]:
        """Stored tensors of a quantized weight."""
        if self.minus_one and not integers.is_symmetric(q.format):
            q = integers.mirrored(q, q.scale.parts["zero"] == 0)
        zero = integers.stored_zero(q)
        if self.minus_one:
            zero = zero - 1
        bits = q.format.grid.bits
        parts = {
            "qweight": pack_columns(self._lengthened(q), bits),
            "qzeros": pack_bits(zero.t(), bits),
            "scales": q.scale.parts["step"].t().contiguous(),
        }
        return {**parts, "g_idx": _order(q.format, q.shape[1], zero.device)} if self.indexed else parts

    def unpack(self, parts: Mapping[str, Tensor], fmt: Format, shape: Sequence[int]) -> QTensor:
        """Inverse of `pack`.

        A `g_idx` among the parts must be the plain order of groups. A version 1 zero point whose bits are all
        ones stands for 0; groups with a negative step are turned back, as the steps of asymmetric formats are
        positive.

        Raises:
            CheckpointError: tensors that `pack` would not have written.
            UnsupportedError: inputs that were reordered by activation.
        """
        integers.check_parts(self.name, parts, self.spec(fmt, shape))
        self._check_order(parts, fmt, shape[1])
        bits = fmt.grid.bits
        zero = unpack_bits(parts["qzeros"], bits)
        if self.minus_one:
            zero = (zero + 1).bitwise_and_((1 << bits) - 1)
        codes = unpack_bits(parts["qweight"].t(), bits)[:, : shape[1]].contiguous()
        step = parts["scales"].t().contiguous()
        q = integers.assemble(self.name, codes, step, zero.t().contiguous(), fmt)
        if self.minus_one and not integers.is_symmetric(fmt):
            return integers.mirrored(q, step < 0)
        return q

    def _length(self, fmt: Format, n_in: int) -> int:
        """Codes of a stored row."""
        return fmt.group.count(n_in) * fmt.group.width(n_in) if self.filled else n_in

    def _lengthened(self, q: QTensor) -> Tensor:
        """Codes of the stored rows."""
        missing = self._length(q.format, q.shape[1]) - q.shape[1]
        if not missing:
            return q.codes
        ends = integers.stored_zero(q)[:, -1:].expand(-1, missing)
        return torch.cat([q.codes, ends], dim=1)

    def _check_order(self, parts: Mapping[str, Tensor], fmt: Format, n_in: int) -> None:
        if "g_idx" not in parts:
            return
        order = parts["g_idx"]
        if not torch.equal(order.to(torch.int32), _order(fmt, n_in, order.device)):
            raise UnsupportedError(
                "the inputs of this checkpoint are reordered by activation (desc_act)",
                [Refusal(self.name, "g_idx is not i // group_size", "use a checkpoint with desc_act false")],
            )


def _order(fmt: Format, n_in: int, device: torch.device) -> Tensor:
    """Group of each input, `[in]` int32."""
    return torch.arange(n_in, dtype=torch.int32, device=device) // fmt.group.width(n_in)
