"""A kernel that the package does not have: one file, and `ROW` in the table of kernels.

It multiplies the whole numbers first and each group's sum by its step:
`y[t, o] = sum_g step[o, g] * sum_i x[t, g, i] * n[o, g, i]`, all in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from auto_round.errors import Refusal
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.table import KernelRow
from auto_round.numerics.presets import int_format
from auto_round.numerics.qtensor import QTensor

NAME = "sums"


@dataclass(frozen=True)
class SumsKernel:
    """Symmetric codes of 4 bits in whole groups; kept as signed bytes beside their steps."""

    name: str = NAME

    def refuses(self, spec):
        fmt, (_, n_in) = spec.fmt, spec.shape
        if fmt != int_format(4, fmt.group.size, sym=True):
            return Refusal(self.name, "holds symmetric whole numbers of 4 bits")
        if fmt.group.size <= 0 or n_in % fmt.group.size:
            return Refusal(
                self.name, f"needs groups of one size that fill {n_in} inputs", "use group_size 32"
            )
        return None

    def compute_dtype(self, spec):
        return spec.dtype  # what comes out; sums are more exact

    def prepare(self, q, spec):
        return {"numbers": (q.codes.to(torch.int16) - 8).to(torch.int8), "step": q.scale.parts["step"]}

    def restore(self, buffers, spec):
        codes = (buffers["numbers"].to(torch.int16) + 8).to(torch.uint8)
        return QTensor(codes, spec.fmt.rule.read({"step": buffers["step"]}), spec.fmt)

    def linear(self, x, buffers, spec, bias):
        size = spec.fmt.group.size
        n = buffers["numbers"].float().unflatten(-1, (-1, size))
        sums = torch.einsum("...gi,ogi->...og", x.float().unflatten(-1, (-1, size)), n)
        y = (sums * buffers["step"].float()).sum(-1)
        return (y if bias is None else y + bias.float()).to(x.dtype)


ROW = KernelRow(
    SumsKernel(),
    priority=9,
    aliases=("made_up:sums",),
    devices="any",
    bits="4",
    sample=LinearSpec(int_format(4, 128, sym=True), (4096, 4096), torch.float32, "cpu"),
    tried=True,
)
