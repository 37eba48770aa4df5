"""How one of several processes ends when the program that started them stops it.

torchrun sends SIGTERM to the others when one process has failed. They may be waiting for that one inside of
PyTorch then, where no exception would reach them: so a thread waits for the signal, says what happened and
ends the process. What is on disk can be continued from at every moment, as after a power cut.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from auto_round.cli import exit_codes
from auto_round.ranks.place import Place

STOPPED = (
    "stopped by the program that started it, as happens when another process of the run fails. What was "
    "finished is kept: the same command continues, with as many processes or others"
)


@contextmanager
def ended_by_launcher(here: Place | None) -> Iterator[None]:
    """End with an error that says so, when one of several processes gets SIGTERM inside the context.

    Args:
        here: this process; None where it is alone, which changes nothing.
    """
    if here is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Thread(target=_watch, args=(reading, here.rank), daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(before_fd)
        os.close(writing)


def _watch(reading: int, rank: int) -> None:
    """Wait for signals, each a byte of the pipe, until the pipe is closed."""
    while signals := os.read(reading, 64):
        if signal.SIGTERM in signals:
            sys.stderr.write(f"auto-round: [rank {rank}] error: {STOPPED}\n")
            sys.stderr.flush()
            os._exit(exit_codes.FAILED)
    os.close(reading)
