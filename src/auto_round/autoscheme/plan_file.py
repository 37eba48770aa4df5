"""The chosen plan as a file: a person can read and edit it, and `--layer_config` takes it back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from auto_round.schemes.scheme import QuantizationScheme

KEPT = "BF16"
"""Name of the scheme that keeps a layer as it is."""


def written(scheme: QuantizationScheme | None) -> str | dict[str, Any]:
    """A scheme as rules name it: a preset's name where one says all, else its fields.

    The dtype of scales is left to the format. Smaller groups than the preset's, where rows needed them, are
    written out. Fields that are missing come from the scheme of the run, so it is said that inputs are left
    alone.
    """
    if scheme is None:
        return KEPT
    usual = replace(scheme, scale_dtype=QuantizationScheme().scale_dtype)
    if usual.presets:
        return usual.presets[0]
    named = {name: value for name, value in usual.to_dict().items() if name != "scale_dtype"}
    return named if scheme.act_quantized else {**named, "act_bits": 16}
