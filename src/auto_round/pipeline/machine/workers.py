"""Threads for work on many weights that do not depend on each other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from auto_round.pipeline.machine.limits import usable_cores

MOST_WORKERS = 4


def worker_count(device: torch.device) -> int:
    """Threads that share such work."""
    return min(MOST_WORKERS, usable_cores()) if device.type == "cpu" else 1


@contextmanager
def workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads that share a CPU's cores among them while the context lasts; a single one for other devices."""
    count = worker_count(device)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(
        count, initializer=torch.set_num_threads, initargs=(max(1, threads // count),)
    ) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)
