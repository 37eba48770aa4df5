"""Words of compressed-tensors' configurations; most say how weights lie in a folder (`format`).

Source: `CompressionFormat` in `config/base.py` of compressed-tensors 0.20.
"""

from __future__ import annotations

COMPRESSED_TENSORS = "compressed-tensors"
"""`quant_method` of such a folder."""

WORDS = "pack-quantized"
"""Whole numbers, packed into words of 32 bits."""
BYTES = "int-quantized"
"""Whole numbers, one a byte."""
FP8 = "float-quantized"
MXFP4 = "mxfp4-pack-quantized"
MXFP6 = "mxfp6-pack-quantized"
MXFP8 = "mxfp8-quantized"
NVFP4 = "nvfp4-pack-quantized"
NAIVE = "naive-quantized"
"""Numbers as they are, whatever their type."""
MIXED = "mixed-precision"
"""Several of these in one folder; each group of layers names its own."""

PATTERN = "re:"
"""What a name of layers begins with that is a regular expression."""
