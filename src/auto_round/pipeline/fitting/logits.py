"""How much memory logits may take while predictions are compared."""

from __future__ import annotations

import torch

LOGITS_BYTES = 256 << 20
"""For logits on a CPU, or where memory is to be spared, while the last block is tuned by predictions."""
ACCELERATOR_LOGITS_BYTES = 2 << 30
"""The same on an accelerator, which needs long matrices to be busy."""
MEASURED_LOGITS_BYTES = 64 << 20
"""Memory for logits when two models are compared (`evaluate.logits`), and when a folder is verified."""


def logits_budget(device: torch.device, *, sparing: bool) -> int:
    """Bytes for logits while the last block is tuned by predictions.

    Args:
        device: where blocks are tuned.
        sparing: memory of an accelerator is to be spared.
    """
    return LOGITS_BYTES if sparing or device.type == "cpu" else ACCELERATOR_LOGITS_BYTES
