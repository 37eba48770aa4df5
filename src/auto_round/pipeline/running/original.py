"""The unquantized model run over some rows, one block in memory at a time, to look into its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from auto_round.facts.layer import Block
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.block_group import BlockGroup, GroupArguments
from auto_round.pipeline.running.streams import Streams
from auto_round.pipeline.running.trace_rows import trace_rows
from auto_round.pipeline.running.tune_group import cast_group
from auto_round.tuning.samples import Samples, run_block


@dataclass(frozen=True, slots=True)
class OriginalBlock:
    """One block with its weights, and what flows into it.

    Attributes:
        job: the run.
        block: which one it is.
        group: the block alone; its parameters are `0.<name in the block>`.
        module: the block.
        table: arguments of all rows.
        streams: what flows in; what flows out is in the targets.
        number: position of the block in its list.
    """

    job: Job
    block: Block
    group: BlockGroup
    module: nn.Module
    table: ArgumentTable
    streams: Streams
    number: int

    def run(self, rows: range) -> None:
        """Run some rows, one at a time."""
        arguments = GroupArguments(self.table, [self.number], self.job.device)
        samples = Samples(self.streams.reference, self.streams.reference, arguments, kind=arguments.kind)
        run_block(self.group, samples, self.streams.targets, batch_size=1, rows=rows, device=self.job.device)

    @property
    def masks(self) -> Tensor | None:
        """`[rows, length]` bool, True where a position counts; None where all do."""
        return self.streams.masks


def original_blocks(job: Job, scratch: Path) -> Iterator[OriginalBlock]:
    """Every block in order; whoever takes one runs all rows through it before the next.

    Args:
        job: the run, with the rows and the dtype wanted here.
        scratch: folder for streams that are too large for memory.
    """
    ended: list[Streams] = []
    for blocks in job.source.block_lists:
        table, streams = trace_rows(job, scratch, ended=ended)
        for number, block in enumerate(blocks):
            with job.source.block(block.index, job.device) as module:
                group = BlockGroup([module], [block.flow])
                cast_group(job, group, [block.index])
                yield OriginalBlock(job, block, group, module, table, streams, number)
            streams.advance()
        ended.append(streams)
