"""Warnings of threads that a run would wait for."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from auto_round.config.env import SPINS, says_how_threads_wait
from auto_round.log import logger
from auto_round.pipeline.machine.limits import usable_cores

FAR_SLOWER = 50.0
"""Times as long from which on it is worth a warning: 1 on a quiet machine, 1000 on a busy one."""
_SHARED, _ALONE = 1 << 16, 1 << 14
"""Numbers of an operation of microseconds that PyTorch gives to several threads, and to one. Source:
`at::internal::GRAIN_SIZE`, 32768."""


def warn_of_threads(device: torch.device) -> None:
    """Warn of more threads than a container has cores, and of threads that wait for other processes.

    Nothing is measured where it is said how threads wait: by the commands (`config.env.wait_shortly`), or by
    the user.
    """
    threads, cores = torch.get_num_threads(), usable_cores()
    if device.type != "cpu" or threads == 1:
        return
    if threads > 2 * cores:
        logger.warning(
            "PyTorch computes with %d threads, but this process may use %d cores: set OMP_NUM_THREADS=%d",
            *(threads, cores, cores),
        )
    elif not says_how_threads_wait() and (times := slower_together()) > FAR_SLOWER:
        logger.warning(
            "the machine is busy: a small operation takes %d times as long with %d threads as with one, for "
            "they wait for each other; set OMP_NUM_THREADS=1, or GOMP_SPINCOUNT=%s, before Python starts",
            *(times, threads, SPINS),
        )


def slower_together(seconds: float = 0.05) -> float:
    """How many times as long as one thread all threads take for as many numbers.

    Args:
        seconds: how long to measure each.
    """
    x = torch.ones(_SHARED, dtype=torch.float32, device="cpu")
    few, out = x[:_ALONE], torch.empty_like(x)
    together = _mean_seconds(lambda: torch.add(x, x, out=out), seconds)
    alone = _mean_seconds(lambda: torch.add(few, few, out=out[:_ALONE]), seconds)
    return together / alone * _ALONE / _SHARED


def _mean_seconds(work: Callable[[], object], seconds: float) -> float:
    """Of one call; the fastest would not show that most of them wait."""
    work()  # threads are made
    done, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        work()
        done += 1
    return taken / done
