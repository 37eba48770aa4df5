"""How much memory logits may take while predictions are compared."""

from __future__ import annotations

import torch

LOGITS_BYTES = 256 << 20
"""For logits on a CPU, or where memory is to be spared, while the last block is tuned by predictions."""
ACCELERATOR_LOGITS_BYTES = 2 << 30
"""The same on an accelerator, which needs long matrices to be busy."""
VERIFIED_ROWS, VERIFIED_POSITIONS = 4, 512
"""Rows, and most positions of each, that a reloaded folder is asked for: fewer where logits of one model
would not fit into `COMPARED_BYTES`."""


def logits_budget(device: torch.device, *, sparing: bool) -> int:
    """Bytes for logits while the last block is tuned by predictions.

    Args:
        device: where blocks are tuned.
        sparing: memory of an accelerator is to be spared.
    """
    return LOGITS_BYTES if sparing or device.type == "cpu" else ACCELERATOR_LOGITS_BYTES
