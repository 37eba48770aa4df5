"""Where measuring starts: what flows into the first block for every row."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from auto_round.autoscheme.parts import Setting
from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.flow import States
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.trace_rows import trace_rows


def begin(setting: Setting, scratch: Path) -> tuple[ArgumentTable, States, Tensor | None]:
    """Arguments of all blocks, what flows into the first one, and which positions count.

    Args:
        setting: what is measured, and on what.
        scratch: folder for what does not fit into memory.

    Raises:
        UnsupportedError: the model has several lists of blocks.
    """
    if len(setting.job.source.block_lists) > 1:
        reason = "what flows out of one list of blocks is measured behind the last one only"
        raise UnsupportedError(
            "AutoScheme cannot measure this model",
            [Refusal("AutoScheme", reason, "name schemes with --scheme and --layer_config")],
        )
    table, streams = trace_rows(setting.job, scratch)
    return table, streams.reference, streams.masks
