"""A second reader of packed weights, slow and written from the descriptions of the formats alone.

It shares no code with `auto_round.layouts`: every code is cut out of one long whole number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["gptq", "awq"]

_AWQ_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class StoredAs:
    """How a packed weight lies in its tensors.

    Attributes:
        order: order of words.
        zero_offset: what to add to a stored zero point.
        bits: width of a code.
        group_size: weights in a group; -1 for one a row.
    """

    order: Order
    zero_offset: int
    bits: int
    group_size: int


PACKINGS: dict[str, tuple[Order, int]] = {
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:gptq": ("gptq", 1),
    "auto": ("gptq", 1),
    "auto_round": ("gptq", 0),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round:auto_awq": ("awq", 0),
    "auto_round:awq": ("awq", 0),
    "gptq": ("gptq", 1),
    "gptq_v2": ("gptq", 0),
    "gemm": ("awq", 0),
}
"""`packing_format`, `checkpoint_format` or `version` -> order of words and offset of zero points."""


def read_weight(parts: Mapping[str, Tensor], stored: StoredAs, shape: Sequence[int]) -> Tensor:
    """Weight `[out, in]` float32 of the tensors `qweight`, `qzeros`, `scales` and, where it is, `g_idx`.

    Exact: each weight is `(code - zero) * scale`, rounded once. The offset is added to a zero point as vLLM's
    kernels do, without masking: a zero point that was stored wrapped is read wrong.
    """
    n_out, n_in = shape
    if stored.order == "gptq":
        codes = [_codes(column, stored.bits, n_in) for column in _words(parts["qweight"].t())]
        zeros = [_codes(row, stored.bits, n_out) for row in _words(parts["qzeros"])]
    else:
        by_input = [_awq_codes(row) for row in _words(parts["qweight"])]
        codes = [[row[o] for row in by_input] for o in range(n_out)]
        zeros = [_awq_codes(row) for row in _words(parts["qzeros"])]
    width = n_in if stored.group_size == -1 or stored.group_size > n_in else stored.group_size
    group = parts["g_idx"].tolist() if "g_idx" in parts else [i // width for i in range(n_in)]
    numbers = [
        [codes[o][i] - zeros[group[i]][o] - stored.zero_offset for i in range(n_in)] for o in range(n_out)
    ]
    steps = parts["scales"].to(torch.float32)[torch.tensor(group)].t()
    return torch.tensor(numbers, dtype=torch.float32) * steps


def _words(rows: Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in row] for row in rows.tolist()]


def _codes(words: Sequence[int], bits: int, count: int) -> list[int]:
    """Codes of a dense stream whose first code has the lowest bits."""
    stream = sum(word << (32 * i) for i, word in enumerate(words))
    return [stream >> (bits * i) & ((1 << bits) - 1) for i in range(count)]


def _awq_codes(words: Sequence[int]) -> list[int]:
    """4-bit codes of AWQ words."""
    return [word >> (4 * nibble) & 15 for word in words for nibble in _AWQ_NIBBLE_OF_OUTPUT]
