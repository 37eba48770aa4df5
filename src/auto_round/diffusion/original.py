"""Components of the original pipeline that run, without being in memory whole unless that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from auto_round.diffusion.prepare import PipelineJob


@contextmanager
def original(job: PipelineJob, name: str) -> Iterator[nn.Module]:
    """An unquantized component that runs: one block of it in memory, unless memory is not to be spared."""
    part, source = job.jobs[name], job.source(name)
    load = source.streamed if part.memory.low_cpu_mem_usage else source.whole
    with load(part.device, part.dtype) as model:
        yield model
