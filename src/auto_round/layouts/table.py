"""The table of layouts: which order of bytes the words of a `quantization_config` mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.errors import ConfigError, nearest
from auto_round.layouts.awq import AWQ
from auto_round.layouts.by_numbers import ByNumbers
from auto_round.layouts.compressed import INT_QUANTIZED
from auto_round.layouts.compressed_float import FLOATS, FP8_LINES
from auto_round.layouts.gptq import GPTQ
from auto_round.layouts.layout import Layout

GPTQ_V1 = GPTQ("gptq_v1", minus_one=True)
"""Zero points stored minus one."""

GPTQ_PLAIN = GPTQ("gptq_plain", minus_one=False)
"""Zero points stored as they are."""

GPTQ_V1_INDEXED = GPTQ("gptq_v1_indexed", minus_one=True, indexed=True)
"""Zero points stored minus one, with the group of each input."""

GPTQ_V2_INDEXED = GPTQ("gptq_v2_indexed", minus_one=False, indexed=True)
"""Zero points stored as they are, with the group of each input."""

AWQ_GEMM = AWQ("awq_gemm")
"""4 bits, interleaved along the output."""

COMPRESSED_NUMBERS = ByNumbers("llm_compressor", (*FLOATS.values(), INT_QUANTIZED))
"""Floating numbers, and whole ones of 8 bits that meet rounded inputs, as compressed-tensors stores them."""

FP8 = ByNumbers("auto_round:fp8", (FP8_LINES,))
"""FP8 weights with a scale for each row, or one."""

PACKING_FORMAT = "packing_format"
"""Key of a `quantization_config` that says in which order the bytes of packed matrices lie."""

LAYOUTS: dict[str, Layout] = {
    "auto_round:auto_gptq": GPTQ_V1,
    "auto_round:gptq": GPTQ_V1,
    "auto": GPTQ_V1,
    "auto_round": GPTQ_PLAIN,
    "auto_round:gptqmodel": GPTQ_PLAIN,
    "auto_round:auto_awq": AWQ_GEMM,
    "auto_round:awq": AWQ_GEMM,
    "auto_round:llm_compressor": COMPRESSED_NUMBERS,
    "auto_round:fp8_static": FP8,
    "auto_round:fp8": FP8,
}
"""Layouts by `packing_format`, with the spellings that loaders accept."""

CHECKPOINT_LAYOUTS: dict[str, Layout] = {
    "gptq": GPTQ_V1_INDEXED,
    "gptq_v2": GPTQ_V2_INDEXED,
    "gemm": AWQ_GEMM,
}
"""Layouts of folders without `packing_format`, by their `checkpoint_format` (GPTQ) or `version` (AWQ)."""


def layout_for(packing_format: str) -> Layout:
    """Layout of a checkpoint's `packing_format`.

    Raises:
        ConfigError: a packing format that is not known.
    """
    if packing_format not in LAYOUTS:
        raise ConfigError(f'unknown packing_format "{packing_format}"; {nearest(packing_format, LAYOUTS)}')
    return LAYOUTS[packing_format]


def packing_format_of(config: Mapping[str, Any]) -> str:
    """`packing_format` of a `quantization_config` of quant_method `auto-round`, or what its absence means."""
    return str(config.get(PACKING_FORMAT, "auto_round:auto_gptq"))


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Layout that a `quantization_config` names.

    Args:
        config: of quant_method `auto-round`, `gptq` or `awq`, as it lies on disk.

    Raises:
        ConfigError: an order of bytes that is not known.
    """
    method = config.get("quant_method")
    if method not in ("gptq", "awq"):
        return layout_for(packing_format_of(config))
    key, usual = ("checkpoint_format", "gptq") if method == "gptq" else ("version", "gemm")
    name = str(config.get(key, usual)).casefold()
    known = [n for n, layout in CHECKPOINT_LAYOUTS.items() if isinstance(layout, AWQ) == (method == "awq")]
    if name not in known:
        raise ConfigError(f'unknown {key} "{name}" of quant_method {method}; {nearest(name, known)}')
    return CHECKPOINT_LAYOUTS[name]
