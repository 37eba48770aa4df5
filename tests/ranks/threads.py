"""Ranks that are threads of one process: what they do together, without `torch.distributed`."""

from __future__ import annotations

import copy
import threading

from auto_round.ranks.ranks import part_of
from auto_round.ranks.tree import fold


class Thread:
    """One of several ranks; `table` and `meeting` belong to all of them."""

    def __init__(self, rank, size, table, meeting):
        self.rank, self.size = rank, size
        self._table, self._meeting = table, meeting

    def objects(self, own):
        self._table[self.rank] = own
        self._meeting.wait()
        found = [x if rank == self.rank else copy.deepcopy(x) for rank, x in enumerate(self._table)]
        self._meeting.wait()
        return found

    def first(self, own):
        return self.objects(own)[0]

    def sum(self, own):
        nodes = {}
        for each in self.objects(own.nodes()):
            nodes |= {n: [None if v is None else v.clone() for v in values] for n, values in each.items()}
        return fold(nodes)

    def share(self, states, rows):
        for each, theirs in zip(states, zip(*self.objects(states), strict=True), strict=True):
            for rank, state in enumerate(theirs):
                part = part_of(rank, self.size, rows)
                if state is not each:
                    each[part.start : part.stop] = state[part.start : part.stop]
            self._meeting.wait()

    def spread(self, states):
        for to, state in zip(states, self.objects(states)[0], strict=True):
            to.copy_(state)
        self._meeting.wait()

    def to_first(self, tensors):
        found = self.objects(tensors)
        yield from () if self.rank else found[1:]


def together(size, work):
    """What `work(ranks)` gives on each of `size` ranks."""
    table, meeting = [None] * size, threading.Barrier(size, timeout=60)
    results, errors = [None] * size, []

    def run(rank):
        try:
            results[rank] = work(Thread(rank, size, table, meeting))
        except Exception as error:  # noqa: BLE001  raised again below
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results
