"""Where measuring starts: what can be measured at all, and what flows into the first block for every row."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from auto_round.autoscheme.candidates import Candidates
from auto_round.autoscheme.parts import ScoringSetting
from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.flow import States
from auto_round.models.source import ModelSource
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.trace_rows import trace_rows

_SHOWN = 3
_FIX = 'give them a scheme, which is then fixed: --layer_config \'{"PART OF THEIR NAMES": "W8A16"}\''


def refuse_unmeasurable(source: ModelSource, candidates: Candidates) -> None:
    """Refuse models and layers whose rounding cannot be followed to the predictions.

    Args:
        source: the model.
        candidates: the layers to choose for.

    Raises:
        UnsupportedError: it has several lists of blocks, or layers are neither in a block nor the head.
    """
    if (lists := len(source.block_lists)) > 1:
        reason = (
            f"it has {lists} lists of blocks, such as an encoder and a decoder, and predictions are followed "
            "back through one"
        )
        raise UnsupportedError(
            "AutoScheme cannot measure this model",
            [Refusal("AutoScheme", reason, "name schemes with --scheme and --layer_config")],
        )
    beside = [
        name for name in candidates.chosen if candidates.layers[name].block is None and name != source.head
    ]
    if beside:
        reason = (
            f"{len(beside)} layers lie outside of the language model's blocks, such as those of encoders: "
            f"{', '.join(beside[:_SHOWN])}{', ...' if len(beside) > _SHOWN else ''}"
        )
        raise UnsupportedError(
            "AutoScheme cannot measure these layers", [Refusal("AutoScheme", reason, _FIX)]
        )


def begin(setting: ScoringSetting, scratch: Path) -> tuple[ArgumentTable, States, Tensor | None]:
    """Arguments of all blocks, what flows into the first one, and which positions count.

    Args:
        setting: what is measured, and on what.
        scratch: folder for what does not fit into memory.
    """
    table, streams = trace_rows(setting.job, scratch)
    return table, streams.reference, streams.masks
