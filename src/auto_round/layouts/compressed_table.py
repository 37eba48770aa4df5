"""All orders of bytes of compressed-tensors, by the `format` of a configuration."""

from __future__ import annotations

from auto_round.layouts.compressed import INTEGERS
from auto_round.layouts.compressed_float import FLOATS
from auto_round.layouts.layout import Layout

COMPRESSED: dict[str, Layout] = {**INTEGERS, **FLOATS}
"""Layouts by the `format` of a compressed-tensors configuration."""
