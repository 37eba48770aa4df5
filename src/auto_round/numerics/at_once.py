"""How many weights are handled at a time: what a core's cache holds, or what keeps an accelerator busy."""

from __future__ import annotations

from collections.abc import Iterator

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


def bands(rows: int, width: int, weights: int, multiple: int = 1) -> Iterator[slice]:
    """Cuts a matrix into bands of rows, so that what is formed besides stays small.

    Args:
        rows: rows of the matrix.
        width: numbers in a row.
        weights: numbers that a band may hold; one that is too wide for that has `multiple` rows.
        multiple: rows that stay together.

    Yields:
        Rows of each band; all but the last hold as many multiples as there is room for.
    """
    each = max(1, weights // max(1, width) // multiple) * multiple
    return (slice(start, min(start + each, rows)) for start in range(0, rows, each))
