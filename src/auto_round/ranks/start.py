"""Joining the other processes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from auto_round.errors import ConfigError, RankError, nearest
from auto_round.ranks.place import place
from auto_round.ranks.ranks import ALONE, Ranks

AUTO = "auto"
MEETING = timedelta(minutes=10)
"""How long a process waits for the others to come."""
WAIT = timedelta(hours=6)
"""How long a process waits for another that is alive: while the first one writes and checks the output the
others do nothing. One that ended is noticed at once, by its closed connections."""


def check_backend(name: str) -> None:
    """Refuse a backend that PyTorch does not have here.

    Raises:
        ConfigError: it does not; names those that it has.
    """
    import torch.distributed as dist

    if name == AUTO:
        return
    known = [each for each in ("gloo", "nccl", "mpi", "ucc", "xccl") if dist.is_backend_available(each)]
    if not dist.is_available() or name not in known:
        raise ConfigError(
            f'unknown or missing backend "{name}" (dist_backend): this PyTorch has {", ".join(known)}; '
            f"{nearest(name, [AUTO, *known])}"
        )


@contextmanager
def join(backend: str, device: torch.device) -> Iterator[Ranks]:
    """The processes that were started together with this one; leaving the context parts them.

    A group that the caller has made already is used, and left as it is.

    Args:
        backend: of `torch.distributed`; "auto" for gloo on processors, and nccl beside it on CUDA.
        device: where this process computes.

    Raises:
        ConfigError: no such backend, or the environment contradicts itself.
        RankError: the others do not come.
    """
    here = place()
    if here is None:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from auto_round.ranks.joined import Joined

    check_backend(backend)
    if dist.is_initialized():
        yield Joined(device)
        return
    if backend == AUTO:
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(rendezvous("env://", here.rank, here.size, timeout=MEETING))
        store.set(f"here-{here.rank}", "")
        store.wait([f"here-{rank}" for rank in range(here.size)], MEETING)
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=WAIT)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {here.rank} of {here.size} cannot join the others: {str(error).strip().splitlines()[0]}"
        ) from error
    try:
        yield Joined(device)
    finally:
        dist.destroy_process_group()
