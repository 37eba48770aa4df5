"""How many weights are handled at a time: what a core's cache holds, or what keeps an accelerator busy."""

from __future__ import annotations

import torch

ELSEWHERE = 1 << 24
"""Weights on an accelerator: each operation then moves tens of MiB, which takes it longer than the processor
needs to ask for the next one (about 5 microseconds); temporaries stay below 1 GiB."""


def weights_at_once(device: torch.device, on_cpu: int) -> int:
    """Weights to handle at a time where these weights are.

    Args:
        device: where the weights are.
        on_cpu: how many suit a CPU, which differs from work to work.
    """
    return on_cpu if device.type == "cpu" else max(on_cpu, ELSEWHERE)
