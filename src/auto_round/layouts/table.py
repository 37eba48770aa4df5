"""The table of layouts: which order of bytes each `packing_format` of a checkpoint means."""

from __future__ import annotations

from auto_round.errors import ConfigError, nearest
from auto_round.layouts.awq import AWQ
from auto_round.layouts.gptq import GPTQ
from auto_round.layouts.layout import Layout

GPTQ_V1 = GPTQ("gptq_v1", minus_one=True)
"""Zero points stored minus one."""

GPTQ_PLAIN = GPTQ("gptq_plain", minus_one=False)
"""Zero points stored as they are."""

AWQ_GEMM = AWQ("awq_gemm")
"""4 bits, interleaved along the output."""

LAYOUTS: dict[str, Layout] = {
    "auto_round:auto_gptq": GPTQ_V1,
    "auto_round:gptq": GPTQ_V1,
    "auto": GPTQ_V1,
    "auto_round": GPTQ_PLAIN,
    "auto_round:gptqmodel": GPTQ_PLAIN,
    "auto_round:auto_awq": AWQ_GEMM,
    "auto_round:awq": AWQ_GEMM,
}
"""Layouts by `packing_format`, with the spellings that loaders accept."""


def layout_for(packing_format: str) -> Layout:
    """Layout of a checkpoint's `packing_format`.

    Raises:
        ConfigError: a packing format that is not known.
    """
    if packing_format not in LAYOUTS:
        raise ConfigError(f'unknown packing_format "{packing_format}"; {nearest(packing_format, LAYOUTS)}')
    return LAYOUTS[packing_format]
